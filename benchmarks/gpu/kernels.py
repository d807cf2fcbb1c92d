"""Attention over an FP8 cache and the fused feed-forward on a GPU: right first, then how fast.

    python benchmarks/gpu/kernels.py [--runs 50] [--quick]

Needs PyTorch and Triton with a CUDA device of compute capability 8.9 or later; this project need not be installed.
Where vLLM, FlashInfer or FlashAttention are importable they are measured, too; what is missing is named.

First every operation is compared with a reference on the device, and the merge of parts runs ten thousand times. Then
the device's copy bandwidth is measured, and with it as the measure, as CUDA graphs, arms in turns, on buffers that
change from round to round and together do not fit into the L2 cache:

    decode        batch 1 to 128, context 1k to 64k, groups of 4 and 8: ours, vLLM's unified attention over its own FP8
                  layout, PyTorch's SDPA over BF16 keys that lie dense, FlashInfer and FlashAttention over paged BF16
    verification  the same with 5 query tokens per request; only vLLM's kernel is compared
    prefill       pieces of 16 to 256 tokens behind 8k and 32k others
    feed-forward  1 to 16 rows of a 1B model's layer: ours, and the same as separate operations of PyTorch, as they are
                  and compiled

The table of all of it comes last; everything goes to ``benchmarks/results/kernels.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from attention import decode, prefill, rivals
from correctness import compare
from timing import HEAD, KV_HEADS, ROOT, can_run, copy_bandwidth, replayed, summary, times, write

BATCHES = (1, 4, 16, 32, 64, 128)
CONTEXTS = (1024, 8192, 32_768, 65_536)
GROUPS = (4, 8)


def feed_forward(rows: int, fp8: bool, runs: int) -> dict[str, Any]:
    """A 1B model's layer, weights of several layers in turn; the rivals are BF16 with separate operations.

    All arms return what the layer adds and the residual stream apart, as layers in a server do. ``compiled`` is
    ``separate`` through torch.compile, which fuses norm and activation with their neighbours, as vLLM does by default.
    """
    import torch

    from vllm_instant_kernels.fused_feed_forward import FeedForwardWeights, Weight, counters_for, feed_forward_parts

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
        arms["ours"].append(replayed(partial(feed_forward_parts, attention, residual, weights, counters=counters)))
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


def printed(measured: dict[str, Any]) -> str:
    """All cells, a line each."""
    bandwidth = measured["copy_bandwidth"]
    lines = [f"copy bandwidth {bandwidth / 1e12:.2f} TB/s"]
    for cell in measured["decode"]:
        share = cell["bytes"] / (cell["us"]["ours"]["median"] * 1e-6) / bandwidth
        lines.append(
            f"batch {cell['batch']:>3}, context {cell['context']:>6}, group {cell['group']}, "
            f"{cell['query_tokens']} query tokens: {_figures(cell)}; {share:.0%} of the copy bandwidth"
        )
    for cell in measured["prefill"]:
        lines.append(f"piece of {cell['piece']:>3} behind {cell['context']:>6}: {_figures(cell)}")
    for cell in measured["feed_forward"]:
        lines.append(f"feed-forward, {cell['rows']:>2} rows, {cell['weights']} weights: {_figures(cell)}")
    return "\n".join(lines)


def _figures(cell: dict[str, Any]) -> str:
    return (
        ", ".join(f"{arm} {x['median']:.1f} [{x['low']:.1f}, {x['high']:.1f}]" for arm, x in cell["us"].items()) + " µs"
    )


def main() -> int:
    """Compare, measure, print, write ``benchmarks/results/kernels.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="a few cells of the grid only")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/kernels.json")
    options = parser.parse_args()
    if not can_run():
        return 2
    import torch

    if torch.cuda.get_device_capability() < (8, 9):
        print("This needs a device of compute capability 8.9 or later.", file=sys.stderr)
        return 2
    measured: dict[str, Any] = {"runs": options.runs, "head": HEAD, "kv_heads": KV_HEADS, "compared": compare()}
    modules = rivals()
    measured["copy_bandwidth"] = copy_bandwidth(options.runs)
    measured["decode"], measured["prefill"], measured["feed_forward"] = [], [], []
    room = torch.cuda.mem_get_info()[0]
    for group in GROUPS[:1] if options.quick else GROUPS:
        for batch in (1, 16) if options.quick else BATCHES:
            for context in CONTEXTS[:2] if options.quick else CONTEXTS:
                # Two FP8 caches and three of BF16, and some room to make them.
                if batch * context * KV_HEADS * HEAD * 20 > room:
                    continue
                for tokens in (1, 5):
                    measured["decode"].append(decode(batch, context, group, tokens, options.runs, modules))
                    print(printed({**measured, "decode": measured["decode"][-1:]}).splitlines()[-1], flush=True)
                    torch.cuda.empty_cache()
    for context in (8192,) if options.quick else (8192, 32_768):
        for piece in (16, 64, 256):
            measured["prefill"].append(prefill(piece, context, options.runs, modules))
            torch.cuda.empty_cache()
    for rows in (1, 4, 8, 16):
        for fp8 in (False, True):
            measured["feed_forward"].append(feed_forward(rows, fp8, options.runs))
            torch.cuda.empty_cache()
    print(printed(measured))
    write(options.output, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
