"""What the kernels around the paged cache compute, in plain tensor operations, float64 where sums are long."""

from __future__ import annotations

import torch

from vllm_instant_kernels.cache_layout import CacheViews


def rotated(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """GPT-NeoX rotation of ``x`` ``[tokens, heads, head]``, in float32."""
    half = cos_sin.shape[1] // 2
    cosine, sine = cos_sin[positions, None, :half].float(), cos_sin[positions, None, half:].float()
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :].float()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ``x`` ``[..., head]`` as bytes of E4M3 numbers, and what each row was divided by."""
    scales = (x.float().abs().amax(-1) / 448.0).clamp(min=1e-6)
    return (x.float() * (1.0 / scales)[..., None]).to(torch.float8_e4m3fn).view(torch.uint8), scales


def write_reference(key: torch.Tensor, value: torch.Tensor, cache: CacheViews, slots: torch.Tensor) -> None:
    """Write keys and values ``[tokens, heads, head]`` as ``quantize_write`` does; slot -1 is no slot."""
    real = slots >= 0
    block, place = slots[real] // cache.keys.shape[1], slots[real] % cache.keys.shape[1]
    for x, stored, scales in (
        (key, cache.keys, cache.key_scales),
        (value, cache.values, cache.value_scales),
    ):
        rows = x[: len(slots)][real]
        if scales is None:
            stored[block, place] = rows.to(stored.dtype)
        else:
            numbers, of_rows = quantized(rows)
            stored.view(torch.uint8)[block, place] = numbers
            scales[block, place] = of_rows


def read_reference(cache: CacheViews, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one request as they are meant, float64 ``[length, heads, head]``."""
    position = torch.arange(length, device=table.device)
    block, place = table[position // cache.keys.shape[1]].long(), position % cache.keys.shape[1]
    found = []
    for stored, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        rows = stored[block, place]
        if scales is None:
            found.append(rows.double())
        else:
            numbers = rows.contiguous().view(torch.float8_e4m3fn).double()
            found.append(numbers * scales[block, place].double()[..., None])
    return found[0], found[1]


def attention_reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int = 0, soft_cap: float = 0.0
) -> torch.Tensor:
    """Causal attention of a request's newest tokens, float64.

    Args:
        query: ``[tokens, query heads, head]``.
        keys: ``[length, KV heads, head]``, those of the query tokens last.
        values: the same shape.
        scale: of the scores.
        window: number of tokens that each token sees, itself included; 0 for all.
        soft_cap: ``c`` of ``c * tanh(s / c)``; 0 for none.

    """
    tokens, group = query.shape[0], query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("qhd,nhd->hqn", query.double(), keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    position = torch.arange(len(keys), device=keys.device)
    of_query = position[len(keys) - tokens :, None]
    seen = position <= of_query
    if window:
        seen &= position > of_query - window
    return torch.einsum("hqn,nhd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)


def paged_attention_reference(
    query: torch.Tensor,
    cache: CacheViews,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    output: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    """As ``paged_attention``, request by request."""
    for request, length in enumerate(lengths.tolist()):
        rows = slice(*starts[request : request + 2].tolist())
        if rows.stop > rows.start:
            keys, values = read_reference(cache, block_tables[request], length)
            found = attention_reference(query[rows], keys, values, scale, window, soft_cap)
            output[rows] = found.to(output.dtype)
