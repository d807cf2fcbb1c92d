"""Random batches over a paged cache, and calls of the kernels on them that other processes can import."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from vllm_instant_kernels.cache_layout import row_bytes, split
from vllm_instant_kernels.paged_attention import paged_attention, workspace_for
from vllm_instant_kernels.prefill_attention import prefill_attention
from vllm_instant_kernels.rope_quantize_write import quantize_write, rope_quantize_write

QUANTIZED = torch.uint8
"""The type of a cache with FP8 numbers and scales."""


@dataclass
class Batch:
    """Requests with their cache, which holds NaN wherever no request has a token."""

    cache: torch.Tensor
    """``[blocks, heads, block_size, row]``."""
    head: int
    query: torch.Tensor
    block_tables: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    keys: list[torch.Tensor]
    """Per request, not quantised."""
    values: list[torch.Tensor]

    @property
    def slots(self) -> list[torch.Tensor]:
        """Slots of the tokens of each request."""
        block_size = self.cache.shape[2]
        found = []
        for table, length in zip(self.block_tables, self.lengths.tolist(), strict=True):
            position = torch.arange(length)
            found.append(table[position // block_size].long() * block_size + position % block_size)
        return found


def batch(
    seed: int,
    requests: list[tuple[int, int]],
    *,
    head: int = 64,
    kv_heads: int = 2,
    group: int = 4,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype = QUANTIZED,
    token_major: bool = False,
) -> Batch:
    """Requests of ``(tokens, query tokens)`` with random normal data.

    ``token_major`` stores a token's heads side by side, otherwise a head's tokens.
    """
    from attention_reference import write_reference

    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // block_size) for length, _ in requests]
    blocks = sum(needed) + 2
    row = row_bytes(head) if cache_dtype == QUANTIZED else 2 * head
    shape = (blocks, block_size, kv_heads, row) if token_major else (blocks, kv_heads, block_size, row)
    if cache_dtype == QUANTIZED:
        # 0x7F is not-a-number in E4M3, and four times it a scale of 3.4e38.
        cache = torch.full(shape, 0x7F, dtype=torch.uint8)
    else:
        cache = torch.full(shape, torch.nan, dtype=cache_dtype)
    if token_major:
        cache = cache.transpose(1, 2)
    order = torch.randperm(blocks, generator=generator).to(torch.int32)
    # Entries after the blocks of a request are never read.
    tables = torch.full((len(requests), max(needed, default=1) + 1), 2**30, dtype=torch.int32)
    used = 0
    for table, number in zip(tables, needed, strict=True):
        table[:number] = order[used : used + number]
        used += number
    heads = kv_heads * group
    query = torch.randn(sum(q for _, q in requests), heads, head, generator=generator).to(dtype)
    keys, values = (
        [torch.randn(length, kv_heads, head, generator=generator).to(dtype) for length, _ in requests] for _ in range(2)
    )
    lengths = torch.tensor([length for length, _ in requests], dtype=torch.int32)
    starts = torch.tensor([0, *(q for _, q in requests)]).cumsum(0).to(torch.int32)
    made = Batch(cache, head, query, tables, lengths, starts, keys, values)
    for key, value, slots in zip(keys, values, made.slots, strict=True):
        write_reference(key, value, split(cache, head, converts=False), slots)
    return made


def random_requests(numbers: random.Random, lengths: list[int], max_query_tokens: int) -> list[tuple[int, int]]:
    """Requests of these lengths in some order, with 0 to ``max_query_tokens`` query tokens, one with the maximum."""
    lengths = numbers.sample(lengths, len(lengths))
    requests = [(length, min(length, numbers.randint(0, max_query_tokens))) for length in lengths]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    requests[longest] = (lengths[longest], min(lengths[longest], max_query_tokens))
    return requests


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected magnitude if that exceeds 1."""
    assert not found.isnan().any(), "rows were not written"
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def assert_exact_to_float32(found: torch.Tensor, expected: torch.Tensor, made: Batch) -> None:
    """Relative L2 error within 1e-6 of float64, and every element within 1e-6 or the effect of rounded scores.

    A score has a rounding error of up to half a float32 ulp of the sum of its magnitudes; it changes an output by up to
    that times the spread of the values: with 256 features sometimes more than 1e-6, in plain float32 operations too.
    """
    rounding = 0.0
    for request, (keys, values) in enumerate(zip(made.keys, made.values, strict=True)):
        query = made.query[made.starts[request] : made.starts[request + 1]]
        group = query.shape[1] // keys.shape[1]
        magnitudes = torch.einsum("qhd,nhd->qhn", query.abs(), keys.abs().repeat_interleave(group, 1))
        if magnitudes.numel():
            score = float(magnitudes.max()) * made.head**-0.5
            rounding = max(rounding, torch.finfo(torch.float32).eps / 2 * score * float(values.abs().max()))
    assert float((found - expected).norm() / expected.norm()) <= 1e-6
    assert largest_error(found, expected) <= max(1e-6, rounding)


def attended(
    kernel: str,
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    head: int,
    max_query_tokens: int,
    options: dict[str, float],
    splits: int | None,
    rounded_to: str = "",
) -> tuple[torch.Tensor, ...]:
    """Attention by ``paged_attention`` or ``prefill_attention``, and the workspace's counters afterwards.

    There is one row after the requests' rows, which must stay NaN. ``rounded_to`` is the type of queries and output,
    for types that cannot be sent between processes.
    """
    if rounded_to:
        query = query.to(getattr(torch, rounded_to))
    rows = query.shape[0]
    query = torch.cat([query, torch.full_like(query[:1], torch.nan)])
    output = torch.full_like(query, torch.nan)
    views, workspace = split(cache, head), workspace_for(query.device, head)
    workspace.sums.fill_(torch.nan)
    keywords = {"scale": head**-0.5, "workspace": workspace, "splits": splits, **options}
    for _ in range(2 if splits and splits > 1 else 1):  # the second launch finds the counters of the first
        if kernel == "paged_attention":
            paged_attention(
                query, views, block_tables, lengths, starts, output, max_query_tokens=max_query_tokens, **keywords
            )
        else:
            prefill_attention(query, views, block_tables, lengths, starts, output, **keywords)
    assert bool(output[rows:].isnan().all()), "rows of no request were written"
    return output[:rows].float(), workspace.arrivals


def written(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    head: int,
    query: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cos_sin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The cache written by ``quantize_write`` or ``rope_quantize_write``, and the rotated queries."""
    views = split(cache, head)
    if query is None:
        quantize_write(key, value, views, slots)
        return (cache,)
    rotated = torch.full_like(query, torch.nan)
    rope_quantize_write(query, key, value, views, slots, positions, cos_sin, rotated)
    return cache, rotated
