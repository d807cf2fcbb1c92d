"""Repairs of speculative decoding on vLLM's CPU build at temperature > 0.

Two functions are wrong there. Each repair is applied only where a probe of the function shows the fault.

1. ``_expand_kernel_impl`` (vLLM issue 55005), the CPU stand-in of the kernel that expands per-request values to
   per-token values, converts its output tensor to int64 and lets the C++ code write into that copy: temperature, top-k
   and top-p of every draft token stay uninitialised memory, and accepted tokens follow no distribution at all.
2. ``apply_top_k_only`` takes the maximum of an empty tensor in a step without draft tokens, such as a step that only
   reads prompts: the first request with top-k and without top-p ends the engine.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_instant.patches.compat import HasSignature, VllmPatch

logger = logging.getLogger("vllm.instant")


def expand(
    output: Any,
    input_val: Any,
    cu_num_tokens: Any,
    replace_from: Any,
    replace_to: Any,
    MAX_NUM_TOKENS: Any = None,  # noqa: N803  the name is vLLM's
) -> None:
    """Write ``input_val[i]`` (``replace_to`` where it equals ``replace_from``) to the tokens of request ``i``.

    Args:
        output: ``[num_tokens]``, any dtype; written in place.
        input_val: ``[batch]``, the values per request.
        cu_num_tokens: ``[batch]``, cumulative token counts.
        replace_from: value to replace.
        replace_to: its replacement.
        MAX_NUM_TOKENS: a launch parameter of the GPU kernel, not needed here.

    """
    import torch

    ends = cu_num_tokens.to(torch.int64)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    values = torch.where(input_val == replace_from, torch.as_tensor(replace_to, dtype=input_val.dtype), input_val)
    output.copy_(torch.repeat_interleave(values, counts))


def expansion_is_wrong(function: Callable[..., Any]) -> bool:
    """Probe an expansion with floats, which is what sampling parameters are."""
    import torch

    output = torch.full((3,), -1.0)
    try:
        function(output, torch.tensor([0.5, 0.0]), torch.tensor([2, 3], dtype=torch.int32), 0, 1)
    # A function that raises here is as unusable as one with a wrong result.
    except Exception:
        return True
    return output.tolist() != [0.5, 0.5, 1.0]


def top_k_is_wrong(function: Callable[..., Any]) -> bool:
    """Probe top-k with no rows."""
    import torch

    try:
        return tuple(function(torch.empty(0, 4), torch.empty(0, dtype=torch.int32)).shape) != (0, 4)
    except Exception:
        return True


def _tolerate_no_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply_top_k_only(logits: Any, k: Any) -> Any:
        return original(logits, k) if logits.shape[0] else logits

    return apply_top_k_only


@dataclass(frozen=True)
class Repair:
    """One function of vLLM, a probe that shows whether it is wrong, and its replacement."""

    module: str
    function: str
    is_wrong: Callable[[Callable[..., Any]], bool]
    replace: Callable[[Callable[..., Any]], Callable[..., Any]]
    fault: str

    def apply(self, module: Any) -> None:
        """Replace the function of a loaded module if it is wrong."""
        function = getattr(module, self.function)
        if self.is_wrong(function):
            setattr(module, self.function, self.replace(function))
            logger.info("Repaired in vLLM's CPU sampling: %s", self.fault)


REPAIRS = (
    Repair(
        "vllm.utils.cpu_triton_utils",
        "_expand_kernel_impl",
        expansion_is_wrong,
        lambda original: expand,
        "temperature, top-k and top-p of draft tokens were uninitialised (issue 55005)",
    ),
    Repair(
        "vllm.v1.sample.ops.topk_topp_sampler",
        "apply_top_k_only",
        top_k_is_wrong,
        _tolerate_no_rows,
        "top-k without top-p ended the engine in steps without draft tokens",
    ),
)


def _repair_expansion(module: Any) -> None:
    REPAIRS[0].apply(module)


def _repair_top_k(module: Any) -> None:
    if _on_cpu():
        REPAIRS[1].apply(module)


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _state() -> str:
    if not _on_cpu():
        return "not needed on this device"
    from importlib import import_module

    wrong = [
        repair.fault for repair in REPAIRS if repair.is_wrong(getattr(import_module(repair.module), repair.function))
    ]
    return "repairs when served with the plugin: " + "; ".join(wrong) if wrong else "nothing to repair in this vLLM"


PATCH = VllmPatch(
    name="cpu_sampling",
    purpose="repairs sampling with speculation on the CPU",
    requirements=(
        HasSignature(
            "utils/cpu_triton_utils.py",
            "_expand_kernel_impl",
            ("output", "input_val", "cu_num_tokens", "replace_from", "replace_to"),
        ),
        HasSignature("v1/sample/ops/topk_topp_sampler.py", "apply_top_k_only", ("logits", "k"), exact=True),
    ),
    slots=("speculation", "drafter", "rejection_sampler"),
    state=_state,
    on_import={REPAIRS[0].module: _repair_expansion, REPAIRS[1].module: _repair_top_k},
)
