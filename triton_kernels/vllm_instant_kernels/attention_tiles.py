"""The attention kernel for decode, verification and prefill, over a paged cache.

The rows of a program are the query heads that share a KV head (a group), for some query tokens of one request, so that
a tile of the cache is read once for all of them.

Numerics. Softmax is computed online, tile by tile (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022), in
base 2. Scores are float32: 16-bit products summed by the tensor cores, times the scale of the key. E4M3 is exact in
float16, so keys and values are only converted; their scales are applied to the columns of scores and probabilities.
Probabilities enter the second product as float16, scaled to the range 0 to ``2 ** 11``: each tile's value scales are
divided by the largest of the tile, and probabilities down to ``2 ** -25`` remain normal numbers. The second product is
accumulated on two levels: tensor cores sum one tile from zero, and a fused multiply-add in float32 adds it to the
running sum over tiles. No sum that tensor cores round is longer than a tile.

Split cache in one launch (flash decoding). If there are too few programs for the device, the cache of a request is cut
into parts. Every program writes the sums of its part to a workspace and increments a counter; the last program to
arrive merges all parts and resets the counter, so that a CUDA graph can replay the launch. No program waits for
another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_instant_kernels.fp8 import from_e4m3

MIN_TILES = 4
"""Minimum number of tiles per part: smaller parts save less than their merge costs."""


@triton.jit
def _tanh(x):
    """Hyperbolic tangent in float32: 1 - 2 / (e^(2x) + 1), and near 0, where that cancels, its Taylor series."""
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    # e^(2x) = 2^(x * 2 log2(e))
    return tl.where(square < 0.0625, series, 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0))


@triton.jit
def _attend_part(
    query,
    row_positions,
    kv_head,
    first_key,
    end_key,
    length,
    table_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    scale,
    block_stride,
    slot_stride,
    head_stride,
    scale_block_stride,
    scale_slot_stride,
    scale_head_stride,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Maximum ``[rows]``, sum ``[rows]`` and weighted values ``[rows, head]`` over the keys ``first_key..end_key``.

    ``query`` ``[rows, head]`` has the type of the factors of products; ``row_positions`` ``[rows]`` are the rows'
    positions in their request, -1 for masked rows. ``scale`` includes log2(e): scores are exponents of 2.
    """
    ROWS: tl.constexpr = query.shape[0]
    HEAD_PADDED: tl.constexpr = query.shape[1]
    IS_FP8: tl.constexpr = key_scales_ptr is not None
    # E4M3 bytes are converted to their 256th part, see fp8.from_e4m3.
    UNIT: tl.constexpr = 256.0 if keys_ptr.dtype.element_ty == tl.uint8 else 1.0
    lane = tl.arange(0, HEAD_PADDED)
    is_lane = lane < HEAD
    maximum = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    for first in range(first_key, end_key, TILE):
        position = first + tl.arange(0, TILE)
        is_key = position < length
        block = tl.load(table_ptr + position // BLOCK, mask=is_key, other=0).to(tl.int64)
        place = position % BLOCK
        row = block * block_stride + place * slot_stride + kv_head * head_stride
        scale_row = block * scale_block_stride + place * scale_slot_stride + kv_head * scale_head_stride
        keys = tl.load(keys_ptr + row[None, :] + lane[:, None], mask=is_key[None, :] & is_lane[:, None], other=0.0)
        if IS_FP8:
            of_keys = tl.load(key_scales_ptr + scale_row, mask=is_key, other=0.0)
            scores = tl.dot(query, from_e4m3(keys, query.dtype), input_precision="ieee")
            scores *= (of_keys * (scale * UNIT))[None, :]
        else:
            scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee") * scale
        if SOFT_CAP > 0.0:
            # Scores to base e for tanh, and back to base 2.
            scores = (SOFT_CAP * 1.4426950408889634) * _tanh(scores * (0.6931471805599453 / SOFT_CAP))
        seen = is_key[None, :] & (position[None, :] <= row_positions[:, None])
        if WINDOW > 0:
            seen = seen & (position[None, :] > row_positions[:, None] - WINDOW)
        scores = tl.where(seen, scores, -1.0e30)
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        # Online softmax: earlier sums are rescaled to the new maximum.
        correction = tl.exp2(maximum - higher)
        # The factor 2^11 cancels: it is in the weighted values and in their sum.
        weights = tl.where(seen, tl.exp2(scores - higher[:, None] + 11.0), 0.0)
        total = tl.fma(total, correction, tl.sum(weights, axis=1))
        values = tl.load(values_ptr + row[:, None] + lane[None, :], mask=is_key[:, None] & is_lane[None, :], other=0.0)
        if IS_FP8:
            of_values = tl.load(value_scales_ptr + scale_row, mask=is_key, other=0.0)
            # float16 weights times scales relative to the largest of the tile stay in range.
            largest = tl.max(of_values, axis=0)
            weights = weights * (of_values / tl.where(largest > 0.0, largest, 1.0))[None, :]
            part = tl.dot(weights.to(query.dtype), from_e4m3(values, query.dtype), input_precision="ieee")
            part = part * (largest * UNIT)
        else:
            part = tl.dot(weights.to(query.dtype), values.to(query.dtype), input_precision="ieee")
        # An explicit fma: "+ dot" would be compiled into one product that accumulates inside the tensor cores.
        weighted = tl.fma(weighted, tl.broadcast_to(correction[:, None], [ROWS, HEAD_PADDED]), part)
        maximum = higher
    return maximum, total, weighted


@triton.jit(do_not_specialize=["requests", "splits"])
def attention_kernel(
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
    RAGGED: tl.constexpr,
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
    """One program: ``ROWS / GROUP`` query tokens of a request (a chunk), one KV head, one part of the cache.

    Grid ``[requests, chunks * KV heads, splits]``, or if ``RAGGED`` ``[chunks of all requests, KV heads, splits]`` with
    ``chunks = tokens // (ROWS // GROUP) + requests``, which is at least their number. ``PRODUCTS`` is the type of the
    factors of products.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    split = tl.program_id(2)
    if RAGGED:
        # Chunks of request r begin at number starts[r] // TOKENS + r, which leaves room for the chunks before it; the
        # request is the last whose chunks begin at or before this number.
        number = tl.program_id(0)
        kv_head = tl.program_id(1)
        request = number * 0
        high = request + requests
        while high - request > 1:
            middle = (request + high) // 2
            if tl.load(starts_ptr + middle) // TOKENS + middle <= number:
                request = middle
            else:
                high = middle
        chunk = number - (tl.load(starts_ptr + request) // TOKENS + request)
    else:
        request = tl.program_id(0)
        chunk = tl.program_id(1) // KV_HEADS
        kv_head = tl.program_id(1) % KV_HEADS
    place_in_workspace = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    start = tl.load(starts_ptr + request)
    tokens = tl.load(starts_ptr + request + 1) - start
    if chunk * TOKENS < tokens:
        length = tl.load(lengths_ptr + request)
        before = length - tokens
        index = tl.arange(0, ROWS)
        token = chunk * TOKENS + index // GROUP
        is_row = (index < TOKENS * GROUP) & (token < tokens)
        row_positions = tl.where(is_row, before + token, -1)
        heads = kv_head * GROUP + index % GROUP
        lane = tl.arange(0, HEAD_PADDED)
        mask = is_row[:, None] & (lane < HEAD)[None, :]
        rows = (start + token).to(tl.int64)
        query_rows = query_ptr + rows[:, None] * query_token_stride + heads[:, None] * query_head_stride
        query = tl.load(query_rows + lane[None, :], mask=mask, other=0.0)
        if PRODUCTS == tl.float16:
            # Saturate at the largest float16 instead of overflowing to infinity.
            query = tl.minimum(tl.maximum(query.to(tl.float32), -65504.0), 65504.0)
        query = query.to(PRODUCTS)

        # Only keys that are visible to a row, in whole tiles.
        end = tl.minimum(length, before + (chunk + 1) * TOKENS)
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(before + chunk * TOKENS - WINDOW + 1, 0) // TILE * TILE
        tiles = tl.cdiv(end - begin, TILE)
        tiles_each = tl.maximum(tl.cdiv(tiles, splits), MIN_TILES)
        parts = tl.cdiv(tiles, tiles_each)
        if split < parts:
            first = begin + split * tiles_each * TILE
            maximum, total, weighted = _attend_part(
                query,
                row_positions,
                kv_head,
                first,
                tl.minimum(first + tiles_each * TILE, end),
                end,
                tables_ptr + request.to(tl.int64) * table_stride,
                keys_ptr,
                values_ptr,
                key_scales_ptr,
                value_scales_ptr,
                scale,
                block_stride,
                slot_stride,
                head_stride,
                scale_block_stride,
                scale_slot_stride,
                scale_head_stride,
                HEAD,
                BLOCK,
                TILE,
                WINDOW,
                SOFT_CAP,
            )
            output_rows = output_ptr + rows[:, None] * output_token_stride + heads[:, None] * output_head_stride
            output_rows += lane[None, :]
            if parts == 1:
                result = weighted / tl.where(total > 0.0, total, 1.0)[:, None]
                tl.store(output_rows, result.to(output_ptr.dtype.element_ty), mask=mask)
            else:
                # The sums of a part: weighted values, then maxima and totals.
                SIZE: tl.constexpr = ROWS * (HEAD_PADDED + 2)
                of_head = sums_ptr + place_in_workspace.to(tl.int64) * (splits * SIZE)
                mine = of_head + split * SIZE
                cells = index[:, None] * HEAD_PADDED + lane[None, :]
                tl.store(mine + cells, weighted)
                tl.store(mine + ROWS * HEAD_PADDED + index, maximum)
                tl.store(mine + ROWS * HEAD_PADDED + ROWS + index, total)
                # Every thread must have stored before one of them increments the counter.
                tl.debug_barrier()
                arrived = tl.atomic_add(arrivals_ptr + place_in_workspace, 1, sem="acq_rel", scope="gpu")
                if arrived == parts - 1:
                    # Rescale as between tiles; ".cg" reads from the L2 cache, where other programs have written.
                    highest = tl.full([ROWS], -1.0e30, tl.float32)
                    for part in range(0, parts):
                        at = of_head + part * SIZE + ROWS * HEAD_PADDED + index
                        highest = tl.maximum(highest, tl.load(at, cache_modifier=".cg"))
                    total = tl.zeros([ROWS], tl.float32)
                    weighted = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
                    for part in range(0, parts):
                        of_part = of_head + part * SIZE
                        at = of_part + ROWS * HEAD_PADDED + index
                        weight = tl.exp2(tl.load(at, cache_modifier=".cg") - highest)
                        total += weight * tl.load(at + ROWS, cache_modifier=".cg")
                        weighted += weight[:, None] * tl.load(of_part + cells, cache_modifier=".cg")
                    result = weighted / tl.where(total > 0.0, total, 1.0)[:, None]
                    tl.store(output_rows, result.to(output_ptr.dtype.element_ty), mask=mask)
                    tl.store(arrivals_ptr + place_in_workspace, 0)
