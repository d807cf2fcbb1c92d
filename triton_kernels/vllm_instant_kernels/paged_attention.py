"""Attention of the newest tokens of each request over a paged cache: decode, and verification of draft tokens.

Each request has 0 to about 16 query tokens. A program takes one KV head of a request, all query heads of its group, as
many query tokens as fit into its rows, and one part of the cache; see ``attention_tiles``.

Bytes. A step must read ``2 * head + 8`` bytes (FP8 with scales) per cached token and KV head: with a head size of 128,
264 instead of 512 for BF16. A cached token is read again only for each further ``ROWS / group`` query tokens of a
request. The block table adds 4 bytes per ``BLOCK`` tokens, the merge about ``8 * head`` bytes per part and row, written
and read once.
"""

from __future__ import annotations

import torch

from vllm_instant_kernels.attention_launch import Workspace, launch_attention, max_rows
from vllm_instant_kernels.cache_layout import CacheViews


def workspace_for(device: torch.device, head_size: int) -> Workspace:
    """A workspace that suffices for all launches over heads of this size, whatever the batch."""
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
    """Causal attention of the newest tokens of each request; correct for any number, efficient for up to about 16.

    Launches one kernel on the current stream without synchronisation; grid and variant depend on shapes and keyword
    arguments alone, so that it can be captured in a CUDA graph. The output of a request does not depend on the others
    of the batch, except through ``splits`` (rounding).

    Args:
        query: float16, bfloat16 or float32 ``[tokens, query heads, head]``, the requests one after another.
        cache: the paged cache, which already holds the keys and values of the query tokens.
        block_tables: int32 ``[requests or more, blocks]``.
        lengths: int32 ``[requests]``: tokens of each request in the cache, including its query tokens.
        starts: int32 ``[requests + 1]``: first query token of each request, then their number; a request may have none.
        output: written, like ``query``; rows of no request are left unchanged.
        max_query_tokens: maximum number of query tokens per request.
        scale: factor on scores, usually ``head ** -0.5``.
        workspace: from ``workspace_for``; no other launch may use it at the same time.
        window: number of tokens that each token sees, itself included; 0 for all.
        soft_cap: ``c`` to replace scores ``s`` by ``c * tanh(s / c)``; 0 for none.
        splits: parts of each cache; chosen by default.

    Raises:
        ValueError: a shape, type or stride is not as above.

    """
    launch_attention(
        query,
        cache,
        block_tables,
        lengths,
        starts,
        output,
        max_query_tokens=max_query_tokens,
        scale=scale,
        workspace=workspace,
        window=window,
        soft_cap=soft_cap,
        splits=splits,
    )
