"""Attention of prompt chunks over a paged cache that holds the tokens before them and the chunks themselves.

Made for chunks of 16 tokens and more, mixed with decoding requests in one batch. The query tokens of all requests are
cut into pieces of ``ROWS / group``; a program finds the request of its piece by bisection, so that the grid depends on
the numbers of tokens and requests only, and a CUDA graph captured for a batch size serves every batch of that size. Few
query tokens over a long cache would leave most of the device idle: the cache is then cut into parts, see
``attention_tiles``.

A chunk of ``n`` tokens at position ``p`` takes ``4 * n * (p + n / 2) * head`` operations per query head. A piece reads
``2 * head + 8`` bytes per token that it sees; with 64 rows and a head size of 128 that is ``4 * 64 * 128 / 264``, about
124 operations per byte, below the 295 at which an H100 is limited by 16-bit arithmetic (989 TFLOP/s, 3.35 TB/s). Pieces
that run at the same time share tiles of the cache in the L2 cache; larger pieces would not fit into registers.
"""

from __future__ import annotations

import torch

from vllm_instant_kernels.attention_launch import Workspace, launch_attention
from vllm_instant_kernels.cache_layout import CacheViews


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
    """As ``paged_attention``, without a limit on the query tokens per request.

    Raises:
        ValueError: a shape, type or stride is not as ``paged_attention`` documents.

    """
    launch_attention(
        query,
        cache,
        block_tables,
        lengths,
        starts,
        output,
        max_query_tokens=None,
        scale=scale,
        workspace=workspace,
        window=window,
        soft_cap=soft_cap,
        splits=splits,
    )
