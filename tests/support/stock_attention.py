"""vLLM's layout and kernel for an FP8 cache with one scale per token and head, callable without a server."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from vllm_instant_kernels.cache_layout import CacheViews

SCALE_BYTES = 4
SEGMENTS = 16
"""Parts that vLLM cuts the cache into when every request has one query token."""


def kernel_module() -> ModuleType:
    """The module of vLLM's unified attention, with real kernels in it also where there is no device."""
    import triton
    import triton.language as tl
    import vllm.triton_utils as imported_by_vllm

    # Without a device vLLM takes stand-ins for Triton, and its kernels could not even be compiled.
    imported_by_vllm.triton, imported_by_vllm.tl = triton, tl
    from vllm.v1.attention.ops import triton_unified_attention

    return triton_unified_attention


def row_bytes(head: int) -> int:
    """Bytes of one token's keys and values of one head: a scale behind either."""
    return 2 * (head + SCALE_BYTES)


def views(cache: torch.Tensor, head: int) -> CacheViews:
    """Parts of a cache ``[blocks, heads, block_size, row_bytes]`` of bytes."""
    rows = cache.transpose(1, 2)
    floats = torch.empty(0, device=cache.device).set_(cache.untyped_storage())
    strides = [step // 4 for step in rows.stride()[:3]]
    numbers = rows.view(torch.float8_e4m3fn)
    behind = (head, 2 * head + SCALE_BYTES)
    return CacheViews(
        numbers[..., :head],
        numbers[..., head + SCALE_BYTES : -SCALE_BYTES],
        *(floats.as_strided(rows.shape[:3], strides, place // 4) for place in behind),
    )


def attend(
    module: ModuleType,
    query: torch.Tensor,
    cache: CacheViews,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    output: torch.Tensor,
    *,
    max_query_tokens: int,
    longest: int,
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """One call, as vLLM's Triton backend makes it; ``sums`` are of ``sums_for``, ``longest`` is of the sequences."""
    from vllm.v1.kv_cache_interface import KVQuantMode

    weighted, maxima, totals = sums
    # vLLM cuts caches only where that many requests do not fill the device by themselves.
    threshold = 128 // cache.keys.shape[2]
    arguments: dict[str, Any] = {
        "q": query,
        "k": cache.keys,
        "v": cache.values,
        "out": output,
        "cu_seqlens_q": starts,
        "max_seqlen_q": max_query_tokens,
        "seqused_k": lengths,
        "max_seqlen_k": longest,
        "softmax_scale": query.shape[2] ** -0.5,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": block_tables,
        "softcap": 0,
        "q_descale": None,
        "k_descale": None,
        "v_descale": None,
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": SEGMENTS,
        "softmax_segm_output": weighted,
        "softmax_segm_max": maxima,
        "softmax_segm_expsum": totals,
        "kv_quant_mode": KVQuantMode.FP8_PER_TOKEN_HEAD,
        "k_scale_cache": cache.key_scales,
        "v_scale_cache": cache.value_scales,
    }
    module.unified_attention(**arguments)


def sums_for(tokens: int, heads: int, head: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Memory for the parts: weighted values, maxima, totals."""
    shape = (tokens, heads, SEGMENTS)
    return (
        torch.empty(*shape, 1 << (head - 1).bit_length(), device=device),
        torch.empty(shape, device=device),
        torch.empty(shape, device=device),
    )
