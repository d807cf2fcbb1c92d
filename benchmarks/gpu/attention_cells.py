"""Attention timed at one batch, context and number of query tokens: decode and verification, and pieces of prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attention_arms
from shapes import BLOCK, HEAD, KV_HEADS, ROTATED_BYTES
from timing import replayed, summary, times


def decode(batch: int, context: int, group: int, tokens: int, runs: int, modules: dict[str, Any]) -> dict[str, Any]:
    """Microseconds of one layer's step for all arms, and what share of the copy bandwidth ours has of its bytes."""
    import torch

    our_bytes = batch * context * KV_HEADS * (2 * HEAD + 8)
    plain_bytes = batch * context * KV_HEADS * 4 * HEAD
    copies = max(1, -(-ROTATED_BYTES // our_bytes))
    blocks = batch * context // BLOCK
    tables = torch.randperm(blocks, device="cuda").to(torch.int32).view(batch, -1)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * tokens
    query = torch.randn(batch * tokens, KV_HEADS * group, HEAD, dtype=torch.bfloat16, device="cuda")
    arms: dict[str, list[Callable[[], Any]]] = {
        "ours": attention_arms.ours(query, tables, lengths, starts, tokens, blocks, copies)
    }
    cell: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "group": group,
        "query_tokens": tokens,
        "bytes": our_bytes,
        "bytes_bf16": plain_bytes,
    }
    for name, make in (
        ("vllm", attention_arms.stock),
        ("flashinfer", attention_arms.flashinfer),
        ("flash_attn", attention_arms.flash_attn),
        ("sdpa", attention_arms.sdpa),
    ):
        if name != "sdpa" and (modules[name] is None or (tokens > 1 and name != "vllm")):
            continue
        if name == "sdpa" and tokens > 1:
            continue
        try:
            arms[name] = make(modules.get(name), query, tables, lengths, starts, tokens, blocks, copies, context)
        # An arm that does not fit or does not start is left out; ours must.
        except Exception as error:
            torch.cuda.empty_cache()
            cell[f"without_{name}"] = f"{type(error).__name__}: {error}"[:200]
    cell["us"] = summary(times(arms, runs))
    return cell


def prefill(piece: int, context: int, runs: int, modules: dict[str, Any]) -> dict[str, Any]:
    """A piece of a prompt behind ``context`` tokens, one request, groups of 4."""
    import torch

    from vllm_instant_kernels.paged_attention import workspace_for
    from vllm_instant_kernels.prefill_attention import prefill_attention

    total = context + piece
    blocks = -(-total // BLOCK)
    tables = torch.randperm(blocks, device="cuda").to(torch.int32)[None]
    lengths = torch.tensor([total], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, piece], dtype=torch.int32, device="cuda")
    query = torch.randn(piece, KV_HEADS * 4, HEAD, dtype=torch.bfloat16, device="cuda")
    workspace = workspace_for(query.device, HEAD)
    copies = max(1, -(-ROTATED_BYTES // (total * KV_HEADS * (2 * HEAD + 8))))
    calls = []
    for _ in range(copies):
        views = attention_arms.cache(blocks)
        call = partial(prefill_attention, query, views, tables, lengths, starts, torch.empty_like(query))
        calls.append(replayed(partial(call, scale=HEAD**-0.5, workspace=workspace)))
    arms: dict[str, Any] = {"ours": calls}
    if modules["vllm"] is not None:
        arms["vllm"] = attention_arms.stock(
            modules["vllm"], query, tables, lengths, starts, piece, blocks, copies, total
        )
    return {"piece": piece, "context": context, "us": summary(times(arms, runs))}
