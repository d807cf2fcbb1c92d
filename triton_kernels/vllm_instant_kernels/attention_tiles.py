"""What decode, verification and prefill share: attention of some query rows over a part of a paged cache.

Rows of a program are the query heads that share a KV head (a group), for some query tokens of one request: a tile of
the cache is read once for all of them.

Numbers. Scores are float32: 16-bit products summed by the tensor cores, times the key's scale. E4M3 is exact in
float16, so that keys and values need no more than a conversion; their scales are applied to columns of scores and
probabilities instead. Probabilities go into the second product as float16, between 0 and ``2 ** 11``: each tile's value
scales are divided by the tile's largest, and probabilities below ``2 ** -25`` are still normal numbers then. The
second product is summed at two levels: the tensor cores sum one tile from zero, and a fused multiply-add in float32
takes that to the running sum of all tiles; running sums of parts of the cache (splits) are merged in float32. No
sum that tensor cores round is longer than a tile.

One launch. Every program of a request leaves its sums in a workspace and counts itself; whoever finds that it is the
last to arrive reads what the others left, merges, and sets the counter back to 0, which makes the launch repeatable in
a CUDA graph. Nobody waits for anybody.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_instant_kernels.cache_layout import CacheViews
from vllm_instant_kernels.fp8 import from_e4m3

LOG2_E = 1.4426950408889634
MAX_SPLITS = 32
"""Parts that the cache of a request is cut into, at most."""
MAX_PROGRAMS = 1024
"""Programs of a launch that cuts caches into parts, at most."""
MIN_TILES = 4
"""Tiles of a part, at least: below that the merge costs more than it spreads."""


@triton.jit
def _tanh(x):
    """Hyperbolic tangent in float32: by exponentials, which cancel near 0, and there by its series."""
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.0625, series, 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0))


@triton.jit
def attend(
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
    """Running maximum ``[rows]``, sum ``[rows]`` and weighted values ``[rows, head]`` over ``first_key..end_key``.

    ``query`` ``[rows, head]`` is of the type that products are made of; ``row_positions`` ``[rows]`` is each row's
    position in its request, -1 for rows that are not there. Scores are to the base 2.
    """
    ROWS: tl.constexpr = query.shape[0]
    HEAD_PADDED: tl.constexpr = query.shape[1]
    IS_FP8: tl.constexpr = key_scales_ptr is not None
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
            scores = (SOFT_CAP * 1.4426950408889634) * _tanh(scores * (0.6931471805599453 / SOFT_CAP))
        seen = is_key[None, :] & (position[None, :] <= row_positions[:, None])
        if WINDOW > 0:
            seen = seen & (position[None, :] > row_positions[:, None] - WINDOW)
        scores = tl.where(seen, scores, -1.0e30)
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        correction = tl.exp2(maximum - higher)
        # The factor 2^11 is in numerator and denominator.
        weights = tl.where(seen, tl.exp2(scores - higher[:, None] + 11.0), 0.0)
        total = tl.fma(total, correction, tl.sum(weights, axis=1))
        values = tl.load(values_ptr + row[:, None] + lane[None, :], mask=is_key[:, None] & is_lane[None, :], other=0.0)
        if IS_FP8:
            of_values = tl.load(value_scales_ptr + scale_row, mask=is_key, other=0.0)
            largest = tl.max(of_values, axis=0)
            weights = weights * (of_values / tl.where(largest > 0.0, largest, 1.0))[None, :]
            part = tl.dot(weights.to(query.dtype), from_e4m3(values, query.dtype), input_precision="ieee")
            part = part * (largest * UNIT)
        else:
            part = tl.dot(weights.to(query.dtype), values.to(query.dtype), input_precision="ieee")
        # Not "+ dot": that would become one product that continues the running sum in the tensor cores.
        weighted = tl.fma(weighted, tl.broadcast_to(correction[:, None], [ROWS, HEAD_PADDED]), part)
        maximum = higher
    return maximum, total, weighted


@triton.jit
def attend_and_merge(
    request,
    chunk,
    kv_head,
    split,
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
    place_in_workspace,
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
    """One program: query tokens ``chunk * TOKENS..`` of a request, one KV head, one part of the cache.

    ``place_in_workspace`` numbers requests, chunks and KV heads together. ``PRODUCTS`` is the type of factors.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
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
            query = tl.minimum(tl.maximum(query.to(tl.float32), -65504.0), 65504.0)
        query = query.to(PRODUCTS)

        # Only keys that some row sees, in whole tiles.
        end = tl.minimum(length, before + (chunk + 1) * TOKENS)
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(before + chunk * TOKENS - WINDOW + 1, 0) // TILE * TILE
        tiles = tl.cdiv(end - begin, TILE)
        tiles_each = tl.maximum(tl.cdiv(tiles, splits), MIN_TILES)
        parts = tl.cdiv(tiles, tiles_each)
        if split < parts:
            first = begin + split * tiles_each * TILE
            maximum, total, weighted = attend(
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
                # A part's sums: weighted values, then maxima and totals.
                SIZE: tl.constexpr = ROWS * (HEAD_PADDED + 2)
                of_head = sums_ptr + place_in_workspace.to(tl.int64) * (splits * SIZE)
                mine = of_head + split * SIZE
                cells = index[:, None] * HEAD_PADDED + lane[None, :]
                tl.store(mine + cells, weighted)
                tl.store(mine + ROWS * HEAD_PADDED + index, maximum)
                tl.store(mine + ROWS * HEAD_PADDED + ROWS + index, total)
                # All threads have stored before one of them announces it.
                tl.debug_barrier()
                arrived = tl.atomic_add(arrivals_ptr + place_in_workspace, 1, sem="acq_rel", scope="gpu")
                if arrived == parts - 1:
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


@dataclass(frozen=True)
class Workspace:
    """Memory for launches that cut caches into parts; one serves all launches of a stream, one after another."""

    sums: torch.Tensor
    """float32, flat."""
    arrivals: torch.Tensor
    """int32 ``[MAX_PROGRAMS]``, 0 between launches."""

    @classmethod
    def on(cls, device: torch.device, rows: int, head_size: int) -> Workspace:
        """For launches with programs of up to so many rows and heads of up to this size.

        Make it before graphs are captured: it must live as long as they do.
        """
        numbers = MAX_PROGRAMS * rows * (triton.next_power_of_2(head_size) + 2)
        return cls(
            torch.empty(numbers, dtype=torch.float32, device=device),
            torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device),
        )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 132


def splits_for(programs: int, device: torch.device) -> int:
    """Into how many parts to cut caches so that the device is busy, if there are so many programs without.

    Two programs fit on a multiprocessor. Powers of two, so that few variants are compiled.
    """
    wanted = min(2 * _multiprocessors(device) // max(programs, 1), MAX_SPLITS, MAX_PROGRAMS // max(programs, 1))
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


def products_of(query: torch.Tensor, cache: CacheViews) -> tl.dtype:
    """The type of the factors that go into tensor cores."""
    if query.dtype == torch.float32:
        return tl.float32
    if cache.is_quantized or query.dtype == torch.float16:
        return tl.float16
    # Triton's interpreter multiplies bfloat16 wrongly.
    return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16


def check(
    query: torch.Tensor,
    cache: CacheViews,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Raise ValueError where shapes, types or strides are not those that ``paged_attention`` documents."""
    kv_heads, head = cache.keys.shape[2:]
    requests = lengths.shape[0]
    for name, tensor, wanted in (
        ("query", query, query.dim() == 3 and query.shape[1] % kv_heads == 0 and query.shape[2] == head),
        ("output", output, output.shape == query.shape),
        ("block_tables", block_tables, block_tables.dim() == 2 and block_tables.shape[0] >= requests),
        ("starts", starts, starts.shape == (requests + 1,)),
    ):
        if not wanted or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} is of shape {tuple(tensor.shape)} and strides {tensor.stride()}, which does not go with "
                f"{requests} requests and {kv_heads} KV heads of {head}"
            )
    if cache.keys.shape[1] & (cache.keys.shape[1] - 1):
        raise ValueError(f"blocks have {cache.keys.shape[1]} tokens; it must be a power of two")
