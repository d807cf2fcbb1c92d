"""The second half of a decoder layer timed at a few rows: fused, and as separate operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timing import replayed, summary, times


def feed_forward(rows: int, fp8: bool, runs: int) -> dict[str, Any]:
    """A 1B model's layer, weights of several layers in turn; the rivals are BF16 with separate operations.

    All arms return what the layer adds and the residual stream apart, as layers in a server do. ``compiled`` is
    ``separate`` through torch.compile, which fuses norm and activation with their neighbours, as vLLM does by default.
    """
    import torch

    from vllm_instant_kernels.fused_feed_forward import FeedForwardWeights, Weight, counters_for, feed_forward_apart

    hidden, inner, layers = 2048, 8192, 4
    attention, residual = (torch.randn(rows, hidden, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    norm = torch.ones(hidden, dtype=torch.bfloat16, device="cuda")

    def weight(outputs: int, inputs: int) -> tuple[Any, Weight]:
        plain = torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") * inputs**-0.5
        if not fp8:
            return plain, Weight(plain)
        scales = (plain.float().abs().amax(1) / 448).clamp(min=1e-6)
        return plain, Weight((plain.float() / scales[:, None]).to(torch.float8_e4m3fn), scales)

    def separate(output: Any, both: Any, down: Any) -> Any:
        x = residual + attention @ output.T
        gate, up = (torch.nn.functional.rms_norm(x, (hidden,), norm, 1e-5) @ both.T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ down.T, x

    compiled = torch.compile(separate)
    arms: dict[str, list[Callable[[], Any]]] = {"ours": [], "separate": [], "compiled": []}
    cell: dict[str, Any] = {"rows": rows, "weights": "FP8" if fp8 else "BF16"}
    for _ in range(layers):
        (o, our_o), (b, our_b), (d, our_d) = weight(hidden, hidden), weight(2 * inner, hidden), weight(hidden, inner)
        weights = FeedForwardWeights(our_o, norm, our_b, our_d)
        counters = counters_for(hidden, norm.device)
        arms["ours"].append(replayed(partial(feed_forward_apart, attention, residual, weights, counters=counters)))
        arms["separate"].append(replayed(partial(separate, o, b, d)))
        if "compiled" in arms:
            try:
                arms["compiled"].append(replayed(partial(compiled, o, b, d)))
            # Not every installation can compile; ours and the plain rival must run.
            except Exception as error:
                del arms["compiled"]
                cell["without_compiled"] = f"{type(error).__name__}: {error}"[:200]
    cell["us"] = summary(times(arms, runs))
    return cell
