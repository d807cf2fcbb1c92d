"""Rotary embedding, quantisation of keys and values, and the write into a paged cache, in one launch.

Separate kernels take three launches, between which keys go to memory and back: rotated in 16 bits, then read to be
quantised. Here a program takes some heads of one token: it rotates queries, or it rotates and quantises keys and writes
them with their values and both scales, so that each row of the cache is written by one program. Keys are quantised from
the float32 result of the rotation (RoPE, Su et al. 2021).

Per token and KV head, with a head size of 128 and 16-bit inputs, a step must read 512 bytes and write 264; with the
queries of a group of four another 1024 each way. For 16 tokens that is a few hundred kilobytes in all: fusing saves
latency, not bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_instant_kernels.cache_layout import CacheViews
from vllm_instant_kernels.fp8 import scale_of, to_e4m3

HEADS = 4
"""Heads per program."""


@triton.jit
def _rotate(x_ptr, cos_sin_ptr, is_row, ROTARY: tl.constexpr, HALF: tl.constexpr):
    """Both halves of the rotated part, float32 ``[heads, HALF]``; ``x_ptr`` points to the first element of each head.

    (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin) for the pair of elements ``i`` and ``i + ROTARY / 2``.
    """
    lane = tl.arange(0, HALF)
    inside = lane < ROTARY // 2
    mask = is_row[:, None] & inside[None, :]
    cosine = tl.load(cos_sin_ptr + lane, mask=inside, other=1.0).to(tl.float32)[None, :]
    sine = tl.load(cos_sin_ptr + ROTARY // 2 + lane, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = tl.load(x_ptr[:, None] + lane[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr[:, None] + ROTARY // 2 + lane[None, :], mask=mask, other=0.0).to(tl.float32)
    return first * cosine - second * sine, second * cosine + first * sine, mask


@triton.jit
def _rope_quantize_write(
    query_ptr,
    key_ptr,
    value_ptr,
    positions_ptr,
    cos_sin_ptr,
    slots_ptr,
    rotated_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    rotated_token_stride,
    rotated_head_stride,
    cos_sin_stride,
    cache_block_stride,
    cache_slot_stride,
    cache_head_stride,
    scale_block_stride,
    scale_slot_stride,
    scale_head_stride,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid ``[tokens, groups of query heads + groups of KV heads]``; without rotation there are no query programs.

    ``ROTARY`` elements of a head are rotated. ``HALF`` is half of them rounded up to a power of two, ``REST`` the
    number of the remaining elements rounded up likewise, or 0.
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    QUERY_GROUPS: tl.constexpr = (QUERY_HEADS + HEADS - 1) // HEADS
    if ROTARY > 0:
        half = tl.arange(0, HALF)
        angles_ptr = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * cos_sin_stride
    if group < QUERY_GROUPS:
        if ROTARY > 0:
            heads = group * HEADS + tl.arange(0, HEADS)
            is_head = heads < QUERY_HEADS
            source = query_ptr + token * query_token_stride + heads * query_head_stride
            target = rotated_ptr + token * rotated_token_stride + heads * rotated_head_stride
            first, second, mask = _rotate(source, angles_ptr, is_head, ROTARY, HALF)
            kind: tl.constexpr = rotated_ptr.dtype.element_ty
            tl.store(target[:, None] + half[None, :], first.to(kind), mask=mask)
            tl.store(target[:, None] + ROTARY // 2 + half[None, :], second.to(kind), mask=mask)
            if REST > 0:
                rest = ROTARY + tl.arange(0, REST)
                mask = is_head[:, None] & (rest < HEAD)[None, :]
                kept = tl.load(source[:, None] + rest[None, :], mask=mask, other=0.0)
                tl.store(target[:, None] + rest[None, :], kept.to(kind), mask=mask)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            heads = (group - QUERY_GROUPS) * HEADS + tl.arange(0, HEADS)
            is_head = heads < KV_HEADS
            block, place = slot // BLOCK, slot % BLOCK
            row = block * cache_block_stride + place * cache_slot_stride + heads * cache_head_stride
            scale_row = block * scale_block_stride + place * scale_slot_stride + heads * scale_head_stride
            stored: tl.constexpr = keys_ptr.dtype.element_ty
            lane = tl.arange(0, HEAD_PADDED)
            whole = is_head[:, None] & (lane < HEAD)[None, :]
            source = key_ptr + token * key_token_stride + heads * key_head_stride
            target = keys_ptr + row
            if ROTARY > 0:
                first, second, mask = _rotate(source, angles_ptr, is_head, ROTARY, HALF)
                largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
                if REST > 0:
                    rest = ROTARY + tl.arange(0, REST)
                    of_rest = is_head[:, None] & (rest < HEAD)[None, :]
                    kept = tl.load(source[:, None] + rest[None, :], mask=of_rest, other=0.0).to(tl.float32)
                    largest = tl.maximum(largest, tl.max(tl.abs(kept), axis=1))
                if key_scales_ptr is not None:
                    scale = scale_of(largest)
                    tl.store(key_scales_ptr + scale_row, scale, mask=is_head)
                    inverse = (1.0 / scale)[:, None]
                    tl.store(target[:, None] + half[None, :], to_e4m3(first * inverse, stored), mask=mask)
                    second_ptr = target[:, None] + ROTARY // 2 + half[None, :]
                    tl.store(second_ptr, to_e4m3(second * inverse, stored), mask=mask)
                    if REST > 0:
                        tl.store(target[:, None] + rest[None, :], to_e4m3(kept * inverse, stored), mask=of_rest)
                else:
                    tl.store(target[:, None] + half[None, :], first.to(stored), mask=mask)
                    tl.store(target[:, None] + ROTARY // 2 + half[None, :], second.to(stored), mask=mask)
                    if REST > 0:
                        tl.store(target[:, None] + rest[None, :], kept.to(stored), mask=of_rest)
            else:
                _store(source, target, key_scales_ptr, scale_row, lane, whole, is_head)
            source = value_ptr + token * value_token_stride + heads * value_head_stride
            _store(source, values_ptr + row, value_scales_ptr, scale_row, lane, whole, is_head)


@triton.jit
def _store(source, target, scales_ptr, scale_row, lane, whole, is_head):
    """Write some heads of one token to the cache without rotation, quantised if there are scales."""
    stored: tl.constexpr = target.dtype.element_ty
    x = tl.load(source[:, None] + lane[None, :], mask=whole, other=0.0)
    if scales_ptr is not None:
        x = x.to(tl.float32)
        scale = scale_of(tl.max(tl.abs(x), axis=1))
        tl.store(scales_ptr + scale_row, scale, mask=is_head)
        tl.store(target[:, None] + lane[None, :], to_e4m3(x * (1.0 / scale)[:, None], stored), mask=whole)
    else:
        tl.store(target[:, None] + lane[None, :], x.to(stored), mask=whole)


def rope_quantize_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: CacheViews,
    slots: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    rotated_query: torch.Tensor,
) -> None:
    """Rotate, quantise and write in one launch on the current stream, without synchronisation.

    The rotation is that of GPT-NeoX: element ``i`` of a head is paired with element ``i + rotary / 2``; elements from
    ``rotary`` on are not rotated. If the cache is not quantised, keys and values are written in its type.

    Args:
        query: 16 or 32-bit floats ``[tokens, query heads, head]``, last stride 1, as for all of these.
        key: ``[at least tokens, KV heads, head]``.
        value: ``[at least tokens, KV heads, head]``.
        cache: the cache to write to.
        slots: integers ``[tokens]``, ``block * block_size + offset``; nothing is written for a token with -1.
        positions: integers ``[tokens]``.
        cos_sin: ``[positions, rotary]``: cosines of ``rotary / 2`` angles, then their sines.
        rotated_query: written, ``[tokens, query heads, head]``; may be ``query`` itself.

    Raises:
        ValueError: a shape or stride is not as above.

    """
    for name, tensor in (("query", query), ("rotated_query", rotated_query)):
        if tensor.shape != (len(slots), query.shape[1], key.shape[2]) or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} is of shape {tuple(tensor.shape)} and strides {tensor.stride()}; it must be of shape "
                f"{(len(slots), query.shape[1], key.shape[2])} with a last stride of 1"
            )
    rotary = cos_sin.shape[1]
    if rotary > key.shape[2] or rotary % 2 or cos_sin.stride(1) != 1:
        raise ValueError(
            f"cos_sin is of shape {tuple(cos_sin.shape)} and strides {cos_sin.stride()}; it must have an even number "
            f"of contiguous columns, at most {key.shape[2]}"
        )
    _launch(query, key, value, cache, slots, positions, cos_sin, rotated_query)


def quantize_write(key: torch.Tensor, value: torch.Tensor, cache: CacheViews, slots: torch.Tensor) -> None:
    """As ``rope_quantize_write``, for keys that are already rotated."""
    _launch(None, key, value, cache, slots, None, None, None)


def _launch(
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: CacheViews,
    slots: torch.Tensor,
    positions: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    rotated: torch.Tensor | None,
) -> None:
    tokens, (kv_heads, head) = slots.shape[0], cache.keys.shape[2:]
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] < tokens or tensor.shape[1:] != (kv_heads, head) or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} is of shape {tuple(tensor.shape)} and strides {tensor.stride()}; it must be of shape "
                f"({tokens} or more, {kv_heads}, {head}) with a last stride of 1"
            )
    if not tokens:
        return
    rotary = 0 if cos_sin is None else cos_sin.shape[1]
    query_heads = 0 if query is None else query.shape[1]
    groups = triton.cdiv(query_heads, HEADS) + triton.cdiv(kv_heads, HEADS)
    _rope_quantize_write[(tokens, groups)](
        query,
        key,
        value,
        positions,
        cos_sin,
        slots,
        rotated,
        cache.keys,
        cache.values,
        cache.key_scales,
        cache.value_scales,
        *(query.stride()[:2] if query is not None else (0, 0)),
        *key.stride()[:2],
        *value.stride()[:2],
        *(rotated.stride()[:2] if rotated is not None else (0, 0)),
        cos_sin.stride(0) if cos_sin is not None else 0,
        *cache.keys.stride()[:3],
        *(cache.key_scales.stride() if cache.key_scales is not None else (0, 0, 0)),
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        HEAD=head,
        HEAD_PADDED=triton.next_power_of_2(head),
        ROTARY=rotary,
        HALF=triton.next_power_of_2(max(rotary // 2, 1)),
        REST=triton.next_power_of_2(head - rotary) if rotary < head else 0,
        BLOCK=cache.keys.shape[1],
        HEADS=HEADS,
        num_warps=1,
    )
