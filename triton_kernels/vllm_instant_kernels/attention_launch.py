"""Launches of the attention kernel: its workspace, its variants and its grid."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_instant_kernels.attention_tiles import MIN_TILES, attention_kernel
from vllm_instant_kernels.cache_layout import CacheViews

LOG2_E = 1.4426950408889634
MIN_ROWS = 16
"""Rows of the smallest tensor core product."""
MAX_SPLITS = 32
"""Maximum number of parts of a request's cache."""
MAX_PROGRAMS = 1024
"""Maximum number of programs of a launch that cuts caches into parts."""


@dataclass(frozen=True)
class Workspace:
    """Memory for launches that cut caches into parts; it can be shared by all launches of one stream."""

    sums: torch.Tensor
    """float32, flat."""
    arrivals: torch.Tensor
    """int32 ``[MAX_PROGRAMS]``, 0 between launches."""

    @classmethod
    def on(cls, device: torch.device, rows: int, head_size: int) -> Workspace:
        """A workspace for programs of up to ``rows`` rows and heads of up to ``head_size``.

        It must be created before graphs are captured and live as long as they do.
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
    """The number of parts per cache that fills the device, given the number of programs without parts.

    Two programs fit on a multiprocessor. A power of two, so that outputs change at few batch sizes only.
    """
    wanted = min(2 * _multiprocessors(device) // max(programs, 1), MAX_SPLITS, MAX_PROGRAMS // max(programs, 1))
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


def max_rows(head_size: int) -> int:
    """Maximum number of rows per program: the sums of more would not fit into registers."""
    return 64 if head_size <= 128 else 32


def rows_for(max_query_tokens: int | None, group: int, head_size: int) -> int:
    """Rows per program, a power of two; every value is a variant of the kernel."""
    largest = max(max_rows(head_size), triton.next_power_of_2(group) if max_query_tokens is None else MIN_ROWS)
    if max_query_tokens is None:
        return largest
    return min(max(MIN_ROWS, triton.next_power_of_2(max_query_tokens * group)), largest)


def tile_for(cache: CacheViews, ragged: bool) -> int:
    """Keys per tile."""
    if cache.keys.shape[3] > 128:
        return 32
    # Converting FP8 in integer operations takes registers, which smaller tiles leave free for the rows of a prefill.
    return 32 if ragged and cache.keys.dtype == torch.uint8 else 64


def products_of(query: torch.Tensor, cache: CacheViews) -> tl.dtype:
    """The type of the factors of tensor core products."""
    if query.dtype == torch.float32:
        return tl.float32
    if cache.is_quantized or query.dtype == torch.float16:
        return tl.float16
    # Triton's interpreter computes products of bfloat16 wrongly.
    return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16


def _check(
    query: torch.Tensor,
    cache: CacheViews,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Raise ValueError unless shapes and strides are as ``paged_attention`` documents."""
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
                f"{name} is of shape {tuple(tensor.shape)} and strides {tensor.stride()}, which does not match "
                f"{requests} requests and {kv_heads} KV heads of {head}"
            )
    if cache.keys.shape[1] & (cache.keys.shape[1] - 1):
        raise ValueError(f"blocks have {cache.keys.shape[1]} tokens; it must be a power of two")


def launch_attention(
    query: torch.Tensor,
    cache: CacheViews,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    output: torch.Tensor,
    *,
    max_query_tokens: int | None,
    scale: float,
    workspace: Workspace,
    window: int,
    soft_cap: float,
    splits: int | None,
) -> None:
    """``paged_attention``; with ``max_query_tokens`` of None for any number of query tokens (the ragged grid)."""
    _check(query, cache, block_tables, lengths, starts, output)
    requests, (kv_heads, head) = lengths.shape[0], cache.keys.shape[2:]
    if not requests or not query.shape[0]:
        return
    group = query.shape[1] // kv_heads
    rows = rows_for(max_query_tokens, group, head)
    tokens = rows // group
    grid: tuple[int, int]
    if max_query_tokens is None:
        grid = query.shape[0] // tokens + requests, kv_heads
    else:
        grid = requests, kv_heads * triton.cdiv(max_query_tokens, tokens)
    programs = grid[0] * grid[1]
    if splits is None:
        splits = splits_for(programs, query.device)
    if splits > 1 and programs * splits > MAX_PROGRAMS:
        raise ValueError(f"{splits} parts make {programs * splits} programs; at most {MAX_PROGRAMS} are possible")
    attention_kernel[(*grid, splits)](
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
        requests if max_query_tokens is None else None,
        splits,
        scale * LOG2_E,
        *query.stride()[:2],
        *output.stride()[:2],
        block_tables.stride(0),
        *cache.keys.stride()[:3],
        *(cache.key_scales.stride() if cache.key_scales is not None else (0, 0, 0)),
        RAGGED=max_query_tokens is None,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD=head,
        HEAD_PADDED=triton.next_power_of_2(head),
        BLOCK=cache.keys.shape[1],
        TILE=tile_for(cache, max_query_tokens is None),
        ROWS=rows,
        MIN_TILES=MIN_TILES,
        WINDOW=window,
        SOFT_CAP=soft_cap,
        PRODUCTS=products_of(query, cache),
        num_warps=4,
        num_stages=3,
    )
