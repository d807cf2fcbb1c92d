"""Requests with a seed whose prompt is read in several pieces: vLLM's CPU build dies of the first one.

In a step that reads a piece of a prompt vLLM samples a token for that request, too, and throws it away. The random
number spent on it is taken back by moving the request's generator back by its offset, which PyTorch's CPU generators do
not have: ``set_offset`` raises, and the engine is gone. Here such a generator is put back to where it was before.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from vllm_instant.patches.compat import HasSignature, References, VllmPatch
from vllm_instant.patches.import_hooks import when_imported

MODEL_RUNNER_MODULE = "vllm.v1.worker.gpu_model_runner"


def generators_have_no_offset() -> bool:
    """Probe PyTorch's CPU generators."""
    import torch

    try:
        torch.Generator().get_offset()
    except RuntimeError:
        return True
    return False


def _thrown_away(runner: Any) -> dict[int, Any]:
    """The generators of requests whose token of this step is thrown away, by batch index."""
    discarded = runner.discard_request_mask.np
    return {
        row: generator
        for row, generator in runner.input_batch.generators.items()
        if row < runner.input_batch.num_reqs and discarded[row]
    }


def _repair(module: ModuleType) -> None:
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() and generators_have_no_offset()):
        return
    runner_class = module.GPUModelRunner
    sample, book = runner_class._sample, runner_class._bookkeeping_sync

    @functools.wraps(sample)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = [(generator, generator.get_state()) for generator in _thrown_away(self).values()]
        sampled = sample(self, *args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return sampled

    @functools.wraps(book)
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        put_back = _thrown_away(self)
        for row in put_back:
            del generators[row]
        try:
            return book(self, *args, **kwargs)
        finally:
            generators.update(put_back)

    runner_class._sample = _sample
    runner_class._bookkeeping_sync = _bookkeeping_sync


def install() -> None:
    """Change the model runner when it is loaded, on CPUs."""
    when_imported(MODEL_RUNNER_MODULE, _repair)


def _state() -> str:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return "not needed on this device"
    if not generators_have_no_offset():
        return "nothing to repair in this PyTorch"
    return "repairs when served with the plugin: a seed with a prompt in pieces ended the engine"


_RUNNER = "v1/worker/gpu_model_runner.py"

PATCH = VllmPatch(
    name="cpu_seeds",
    purpose="requests with a seed may have prompts that are read in pieces, on the CPU",
    requirements=(
        HasSignature(_RUNNER, "GPUModelRunner._sample", ("self", "logits", "spec_decode_metadata")),
        References(_RUNNER, "GPUModelRunner._bookkeeping_sync", ("discard_request_mask", "generators", "input_batch")),
    ),
    optional=True,
    state=_state,
)
