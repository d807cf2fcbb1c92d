"""vLLM's rejection sampler and ours in this process, without a model: metadata as the V1 model runner makes it.

Shared by the sampler benchmark and the sampler's tests.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler, apply_sampling_constraints
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.patches.cpu.sampling import REPAIRS
from vllm_instant.patches.rejection_sampler import SAMPLER_ATTRIBUTE, sampler_class


def prepare_cpu_kernels() -> None:
    """What a CPU worker does before it samples, and our repairs of it."""
    import vllm.utils.cpu_triton_utils as stand_ins
    import vllm.v1.sample.ops.topk_topp_sampler as truncation

    current_platform.import_kernels()
    for repair, module in zip(REPAIRS, (stand_ins, truncation), strict=True):
        repair.apply(module)
    # vLLM looks through all loaded modules now, and stumbles over one that Numba loads.
    stumbling_block = sys.modules.pop("llvmlite.binding.ffi", None)
    try:
        current_platform.register_triton_kernel_overrides()
    finally:
        if stumbling_block is not None:
            sys.modules["llvmlite.binding.ffi"] = stumbling_block


def stock_sampler() -> Any:
    """VLLM's own."""
    return RejectionSampler(Sampler(), None, torch.device("cpu"))


def our_sampler(plugin: Any, name: str = "tested") -> Any:
    """VLLM's own with a plugin in it, as the patch makes it."""
    sampler = stock_sampler()
    sampler.__class__ = sampler_class(RejectionSampler, apply_sampling_constraints)
    setattr(sampler, SAMPLER_ATTRIBUTE, GuardedPlugin("rejection_sampler", name, plugin))
    return sampler


def drafts_metadata(drafts: Sequence[Sequence[int]]) -> Any:
    """``SpecDecodeMetadata`` of these drafts, one list per request."""
    device = torch.device("cpu")
    metadata = SpecDecodeMetadata.make_dummy([list(row) for row in drafts], device)
    target, bonus, row = [], [], 0
    for tokens in drafts:
        target.extend(range(row, row + len(tokens)))
        bonus.append(row + len(tokens))
        row += len(tokens) + 1
    metadata.target_logits_indices = torch.tensor(target, dtype=torch.int32)
    metadata.bonus_logits_indices = torch.tensor(bonus, dtype=torch.int32)
    metadata.draft_token_ids = metadata.draft_token_ids.to(torch.int32)
    return metadata


def sampling_metadata(
    temperatures: Sequence[float],
    top_p: Sequence[float] | None = None,
    generators: dict[int, torch.Generator] | None = None,
    max_num_logprobs: int | None = None,
) -> Any:
    """``SamplingMetadata`` of a batch without penalties; temperature 0 is greedy."""
    batch = len(temperatures)
    zeros = torch.zeros(batch)
    return SamplingMetadata(
        temperature=None if not any(temperatures) else torch.tensor(temperatures),
        all_greedy=not any(temperatures),
        all_random=all(temperatures),
        top_p=None if top_p is None else torch.tensor(top_p),
        top_k=None,
        generators=generators or {},
        max_num_logprobs=max_num_logprobs,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=zeros,
        presence_penalties=zeros,
        repetition_penalties=zeros + 1,
        output_token_ids=[[] for _ in range(batch)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
