"""Attention of a piece of a prompt over a paged cache that holds what came before it, and the piece itself.

Made for pieces of 16 tokens and more, mixed in one batch with requests that decode. Query tokens of all requests are
cut into chunks of ``ROWS / group``; a program finds the request of its chunk by bisection, so that the grid depends on
the number of tokens and requests only and a CUDA graph captured for a batch serves every batch of that size. Few query
tokens over a long cache would leave most of the device idle: then the cache is cut into parts as in
``paged_attention``.

A piece of ``n`` tokens at position ``p`` computes ``4 * n * (p + n / 2) * head`` operations a query head. A chunk must
read ``2 * head + 8`` bytes for each token it sees; with 64 rows and a head size of 128 that is ``4 * 64 * 128 / 264``,
about 124 operations a byte, below the 295 at which an H100 is limited by 16-bit arithmetic (989 TFLOP/s, 3.35 TB/s).
Chunks that run at the same time find the cache's tiles in the L2 cache; larger ones would not fit into registers.
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
from vllm_instant_kernels.paged_attention import max_rows


@triton.jit(do_not_specialize=["splits", "requests"])
def _prefill_attention(
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
    requests,
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
    """Grid ``[tokens // TOKENS + requests, KV heads, splits]``: at least as many chunks as there are.

    Chunks of request ``r`` begin at number ``starts[r] // TOKENS + r``, which leaves room for those before it.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    number = tl.program_id(0)
    low = number * 0
    high = low + requests
    # The last request whose chunks begin at or before this number.
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // TOKENS + middle <= number:
            low = middle
        else:
            high = middle
    kv_head = tl.program_id(1)
    attend_and_merge(
        low,
        number - (tl.load(starts_ptr + low) // TOKENS + low),
        kv_head,
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
        number * tl.num_programs(1) + kv_head,
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


def prefill_attention(
    query: torch.Tensor,
    cache: CacheViews,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    output: torch.Tensor,
    *,
    scale: float,
    workspace: Workspace,
    window: int = 0,
    soft_cap: float = 0.0,
    splits: int | None = None,
) -> None:
    """As ``paged_attention``, without a bound on the query tokens of a request.

    Raises:
        ValueError: a shape, type or stride is not as ``paged_attention`` documents.

    """
    check(query, cache, block_tables, lengths, starts, output)
    requests, (kv_heads, head) = lengths.shape[0], cache.keys.shape[2:]
    if not requests or not query.shape[0]:
        return
    group = query.shape[1] // kv_heads
    rows = max(max_rows(head), triton.next_power_of_2(group))
    chunks = query.shape[0] // (rows // group) + requests
    if splits is None:
        splits = splits_for(chunks * kv_heads, query.device)
    if splits > 1 and chunks * kv_heads * splits > MAX_PROGRAMS:
        total = chunks * kv_heads * splits
        raise ValueError(f"{splits} parts make {total} programs; at most {MAX_PROGRAMS} are possible")
    _prefill_attention[(chunks, kv_heads, splits)](
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
        requests,
        splits,
        scale * LOG2_E,
        *query.stride()[:2],
        *output.stride()[:2],
        block_tables.stride(0),
        *cache.keys.stride()[:3],
        *(cache.key_scales.stride() if cache.key_scales is not None else (0, 0, 0)),
        GROUP=group,
        HEAD=head,
        HEAD_PADDED=triton.next_power_of_2(head),
        BLOCK=cache.keys.shape[1],
        # Converting FP8 numbers in integer operations takes registers, which smaller tiles leave.
        TILE=64 if head <= 128 and cache.keys.dtype != torch.uint8 else 32,
        ROWS=rows,
        MIN_TILES=MIN_TILES,
        WINDOW=window,
        SOFT_CAP=soft_cap,
        PRODUCTS=products_of(query, cache),
        num_warps=4,
        num_stages=3,
    )
