"""Restore the generators of seeded requests whose prompt is read in several steps (CPU).

In a step that reads a part of a prompt vLLM samples a token for that request, too, and discards it. To undo the random
draw vLLM moves the request's generator back by its offset. PyTorch's CPU generators have no offset: ``set_offset``
raises, and the engine ends. Here the state of such a generator is saved before sampling and restored afterwards.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from vllm_instant.patches.compat import HasSignature, References, VllmPatch
from vllm_instant.patches.names import MODEL_RUNNER


def generators_have_no_offset() -> bool:
    """Probe PyTorch's CPU generators."""
    import torch

    try:
        torch.Generator().get_offset()
    except RuntimeError:
        return True
    return False


def _discarded(runner: Any) -> dict[int, Any]:
    """The generators of requests whose token of this step is discarded, by batch index."""
    discarded = runner.discard_request_mask.np
    return {
        row: generator
        for row, generator in runner.input_batch.generators.items()
        if row < runner.input_batch.num_reqs and discarded[row]
    }


@cache
def is_needed() -> bool:
    """Whether vLLM runs on a CPU whose generators lack an offset."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu()) and generators_have_no_offset()


def _sample(sample: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    before = [(generator, generator.get_state()) for generator in _discarded(runner).values()] if is_needed() else []
    sampled = sample(*args, **kwargs)
    for generator, state in before:
        generator.set_state(state)
    return sampled


def _bookkeeping_sync(synchronise: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Hide the generators that ``_sample`` has restored from the code that would set their offsets."""
    hidden = _discarded(runner) if is_needed() else {}
    generators = runner.input_batch.generators
    for row in hidden:
        del generators[row]
    try:
        return synchronise(*args, **kwargs)
    finally:
        generators.update(hidden)


def _state() -> str:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return "not needed on this device"
    if not generators_have_no_offset():
        return "nothing to repair in this PyTorch"
    return "repairs when served with the plugin: a seed with a prompt read in several steps ended the engine"


_RUNNER = "v1/worker/gpu_model_runner.py"

PATCH = VllmPatch(
    name="cpu_generator_offset",
    purpose="requests with a seed may have prompts that are read in several steps, on the CPU",
    requirements=(
        HasSignature(_RUNNER, "GPUModelRunner._sample", ("self", "logits", "spec_decode_metadata")),
        References(_RUNNER, "GPUModelRunner._bookkeeping_sync", ("discard_request_mask", "generators", "input_batch")),
    ),
    optional=True,
    state=_state,
    wraps={
        f"{MODEL_RUNNER}:GPUModelRunner._sample": _sample,
        f"{MODEL_RUNNER}:GPUModelRunner._bookkeeping_sync": _bookkeeping_sync,
    },
)
