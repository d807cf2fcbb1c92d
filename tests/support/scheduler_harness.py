"""vLLM's scheduler classes in this process, with a model's configuration but without a model, a worker or a device.

Shared by the scheduler benchmark and the scheduler's tests: requests are real, what the model would have answered is
made up by the caller.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK_SIZE = 32


def engine_config(model: Path, drafts: int, max_num_seqs: int, asynchronous: bool = False) -> Any:
    """A VllmConfig with n-gram speculation of ``drafts`` tokens (0 for none)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    speculative = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 4} if drafts else None
    config = EngineArgs(
        model=str(model),
        max_model_len=1024,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(8192, max_num_seqs * (drafts + 1)),
        block_size=BLOCK_SIZE,
        enforce_eager=True,
        dtype="float32",
        speculative_config=speculative,
        enable_prefix_caching=False,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = 40_000
    # The CPU platform only schedules synchronously; the class that a GPU would get needs no device.
    config.scheduler_config.async_scheduling = asynchronous
    init_none_hash(sha256)
    return config


def make_scheduler(factory: Any, config: Any) -> Any:
    """A scheduler of the class (or from the factory) with a large KV cache that exists only on paper."""
    import torch

    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=64, dtype=torch.float32)
    blocks = config.cache_config.num_gpu_blocks
    cache = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    return factory(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        log_stats=True,
    )


STOP_TOKEN = 7
"""Ends a request that ``answer`` gives it to."""


def make_request(
    number: int,
    prompt_tokens: int = 16,
    max_tokens: int = 512,
    temperature: float = 0.0,
    request_id: str | None = None,
) -> Request:
    """A request with a made-up prompt that depends on ``number`` only."""
    return Request(
        request_id=request_id or f"request-{number}",
        prompt_token_ids=[(number * 7 + i) % 4000 + 2 for i in range(prompt_tokens)],
        sampling_params=SamplingParams(
            max_tokens=max_tokens, temperature=temperature, ignore_eos=True, stop_token_ids=[STOP_TOKEN]
        ),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


def answer(scheduler_output: Any, accepted: dict[str, int], prefilling: set[str] = frozenset()) -> ModelRunnerOutput:  # type: ignore[assignment]
    """What a model runner would report: ``accepted[request] + 1`` tokens each, none while still prefilling."""
    ids = list(scheduler_output.num_scheduled_tokens)
    sampled = [[] if i in prefilling else [5] * (accepted.get(i, 0) + 1) for i in ids]
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
        sampled_token_ids=sampled,
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def drafts_for(scheduler_output: Any, length: int) -> DraftTokenIds:
    """Drafts of one length for everyone, as a drafter would hand them back."""
    ids = list(scheduler_output.num_scheduled_tokens)
    return DraftTokenIds(ids, [[7] * length for _ in ids])
