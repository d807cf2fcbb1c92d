"""Repair of speculative decoding on vLLM's CPU build at temperature > 0 (vLLM issue 55005).

The CPU stand-in of the kernel that expands per-request values to per-token values converts its output tensor to int64
and lets the C++ code write into that copy, so that temperature, top-k and top-p of every draft token stay uninitialised
memory: accepted tokens then follow no distribution at all. The repair writes into the tensor that the caller gave. It
is applied only where a probe of the function shows the fault.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_instant.seams.import_hooks import when_imported
from vllm_instant.seams.requirements import Function, Seam

logger = logging.getLogger("vllm.instant")

MODULE = "vllm.utils.cpu_triton_utils"
FUNCTION = "_expand_kernel_impl"


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


def is_wrong(function: Callable[..., Any]) -> bool:
    """Probe an implementation of the expansion on floats, which is what sampling parameters are."""
    import torch

    output = torch.full((3,), -1.0)
    try:
        function(output, torch.tensor([0.5, 0.0]), torch.tensor([2, 3], dtype=torch.int32), 0, 1)
    # A function that cannot expand three floats is as unusable as one that does it wrongly.
    except Exception:
        return True
    return output.tolist() != [0.5, 0.5, 1.0]


def _repair(module: ModuleType) -> None:
    if is_wrong(getattr(module, FUNCTION)):
        setattr(module, FUNCTION, expand)
        logger.info("vLLM's CPU sampling with speculation is wrong in this version (issue 55005); repaired")


def install() -> None:
    """Repair the function when its module is loaded, if it needs it."""
    when_imported(MODULE, _repair)


def _state() -> str:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return "not needed on this device"
    from vllm.utils import cpu_triton_utils

    function = getattr(cpu_triton_utils, FUNCTION)
    if function is expand or is_wrong(function):
        return "vLLM's function is wrong here: the repair is applied when served with the plugin"
    return "vLLM's function is right here: no repair is applied"


SEAM = Seam(
    name="cpu_sampling",
    purpose="repairs sampling with speculation on the CPU",
    requirements=(
        Function(
            "utils/cpu_triton_utils.py",
            FUNCTION,
            ("output", "input_val", "cu_num_tokens", "replace_from", "replace_to"),
        ),
    ),
    slots=("speculation", "drafter", "rejection_sampler"),
    state=_state,
)
