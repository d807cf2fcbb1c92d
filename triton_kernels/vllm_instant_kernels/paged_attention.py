"""Attention of new tokens over a paged cache: decode, and verification of draft tokens.

Each request has 0 to about 16 query tokens, the newest of its sequence. A program takes a KV head of a request, all
query heads of its group, and as many query tokens as fit in its rows, so that the cache is read once for all of them;
and one part of the cache, of as many parts as keep the device busy. How scales are applied, how sums are kept, and how
the last program to arrive merges the parts is in ``attention_tiles``.

Bytes. A step must read ``2 * head + 8`` bytes (FP8 with scales) for each cached token and KV head; with a head size of
128, 264 instead of 512 for BF16. It reads a cached token again only for each ``ROWS / group`` query tokens of one
request. The block table adds 4 bytes a ``BLOCK`` tokens, the merge about ``8 * head`` bytes a part and row, once
written and once read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_instant_kernels.attention_tiles import (
    LOG2_E,
    MAX_PROGRAMS,
    MIN_TILES,
    Workspace,
    attend_and_merge,
    check,
    products_of,
    splits_for,
)
from vllm_instant_kernels.cache_layout import CacheViews


@triton.jit(do_not_specialize=["splits"])
def _paged_attention(
    query_ptr,
    output_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    tables_ptr,
    lengths_ptr,
    starts_ptr,
    sums_ptr,
    arrivals_ptr,
    splits,
    scale,
    query_token_stride,
    query_head_stride,
    output_token_stride,
    output_head_stride,
    table_stride,
    block_stride,
    slot_stride,
    head_stride,
    scale_block_stride,
    scale_slot_stride,
    scale_head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Grid ``[requests, chunks of query tokens * KV heads, splits]``."""
    request = tl.program_id(0)
    head_and_chunk = tl.program_id(1)
    attend_and_merge(
        request,
        head_and_chunk // KV_HEADS,
        head_and_chunk % KV_HEADS,
        tl.program_id(2),
        splits,
        query_ptr,
        output_ptr,
        keys_ptr,
        values_ptr,
        key_scales_ptr,
        value_scales_ptr,
        tables_ptr,
        lengths_ptr,
        starts_ptr,
        sums_ptr,
        arrivals_ptr,
        request * tl.num_programs(1) + head_and_chunk,
        scale,
        query_token_stride,
        query_head_stride,
        output_token_stride,
        output_head_stride,
        table_stride,
        block_stride,
        slot_stride,
        head_stride,
        scale_block_stride,
        scale_slot_stride,
        scale_head_stride,
        GROUP,
        HEAD,
        HEAD_PADDED,
        BLOCK,
        TILE,
        ROWS,
        MIN_TILES,
        WINDOW,
        SOFT_CAP,
        PRODUCTS,
    )


def max_rows(head_size: int) -> int:
    """Rows of a program, at most: the sums of more would not fit into its registers."""
    return 64 if head_size <= 128 else 32


def workspace_for(device: torch.device, head_size: int) -> Workspace:
    """Memory that suffices for all launches over heads of this size, whatever the batch."""
    return Workspace.on(device, max_rows(head_size), head_size)


def paged_attention(
    query: torch.Tensor,
    cache: CacheViews,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    output: torch.Tensor,
    *,
    max_query_tokens: int,
    scale: float,
    workspace: Workspace,
    window: int = 0,
    soft_cap: float = 0.0,
    splits: int | None = None,
) -> None:
    """Causal attention of the newest tokens of each request; right for any number of them, made for up to about 16.

    Launches once on the current stream and waits for nothing; grid and variant follow from shapes and keyword arguments
    alone, so that it can be captured in a CUDA graph. The outcome for a request does not depend on the others in the
    batch, save through ``splits`` (rounding).

    Args:
        query: float16, bfloat16 or float32 ``[tokens, query heads, head]``, all requests one after another.
        cache: the paged cache, which holds the query tokens' keys and values already.
        block_tables: int32 ``[requests or more, blocks]``.
        lengths: int32 ``[requests]``, tokens of each request in the cache, its query tokens included.
        starts: int32 ``[requests + 1]``, first query token of each request, and their number; a request may have none.
        output: written, like ``query``; rows that belong to no request stay as they are.
        max_query_tokens: no request has more.
        scale: what scores are multiplied with, usually ``head ** -0.5``.
        workspace: of ``workspace_for``; no other launch may use it at the same time.
        window: each token sees only so many, itself included; 0 is all.
        soft_cap: ``c`` if scores ``s`` shall be ``c * tanh(s / c)``; 0 for none.
        splits: parts of the cache; chosen by default.

    Raises:
        ValueError: a shape, type or stride is not as above.

    """
    check(query, cache, block_tables, lengths, starts, output)
    requests, (kv_heads, head) = lengths.shape[0], cache.keys.shape[2:]
    if not requests or not query.shape[0]:
        return
    group = query.shape[1] // kv_heads
    rows = min(max(16, triton.next_power_of_2(max_query_tokens * group)), max(max_rows(head), 16))
    chunks = triton.cdiv(max_query_tokens, rows // group)
    programs = requests * kv_heads * chunks
    if splits is None:
        splits = splits_for(programs, query.device)
    if splits > 1 and programs * splits > MAX_PROGRAMS:
        raise ValueError(f"{splits} parts make {programs * splits} programs; at most {MAX_PROGRAMS} are possible")
    _paged_attention[(requests, kv_heads * chunks, splits)](
        query,
        output,
        cache.keys,
        cache.values,
        cache.key_scales,
        cache.value_scales,
        block_tables,
        lengths,
        starts,
        workspace.sums,
        workspace.arrivals,
        splits,
        scale * LOG2_E,
        *query.stride()[:2],
        *output.stride()[:2],
        block_tables.stride(0),
        *cache.keys.stride()[:3],
        *(cache.key_scales.stride() if cache.key_scales is not None else (0, 0, 0)),
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD=head,
        HEAD_PADDED=triton.next_power_of_2(head),
        BLOCK=cache.keys.shape[1],
        TILE=64 if head <= 128 else 32,
        ROWS=rows,
        MIN_TILES=MIN_TILES,
        WINDOW=window,
        SOFT_CAP=soft_cap,
        PRODUCTS=products_of(query, cache),
        num_warps=4,
        num_stages=3,
    )
