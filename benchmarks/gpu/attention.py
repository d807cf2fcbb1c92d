"""Attention on a GPU, ours and its rivals: decode and verification at one batch and context, and pieces of prompts.

Each arm is a list of CUDA graphs over several buffers that take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timing import BLOCK, HEAD, KV_HEADS, ROTATED_BYTES, replayed, summary, times


def rivals() -> dict[str, Any]:
    """Modules that can be measured beside ours, None where they are not importable."""
    import importlib

    found: dict[str, Any] = {}
    for name, module in (("vllm", "stock_attention"), ("flashinfer", "flashinfer"), ("flash_attn", "flash_attn")):
        try:
            found[name] = importlib.import_module(module)
            if name == "vllm":
                found[name].kernel_module()
        # Another project's package can fail to load in any way.
        except Exception as error:
            print(f"{name} is not measured: {type(error).__name__}: {error}")
            found[name] = None
    return found


def _fp8(shape: tuple[int, ...]) -> Any:
    """Bytes that are finite E4M3 numbers, drawn once and repeated."""
    import torch

    size = 1
    for extent in shape:
        size *= extent
    some = torch.randint(0, 0x58, (min(size, 1 << 24),), dtype=torch.uint8, device="cuda")
    return some.repeat(-(-size // len(some)))[:size].view(shape)


def cache(blocks: int) -> Any:
    """A cache in our layout with made-up content."""
    from vllm_instant_kernels.cache_layout import row_bytes, split

    views = split(_fp8((blocks, KV_HEADS, BLOCK, row_bytes(HEAD))), HEAD)
    for scales in (views.key_scales, views.value_scales):
        if scales is not None:
            scales.fill_(0.01)
    return views


def ours(query: Any, tables: Any, lengths: Any, starts: Any, tokens: int, blocks: int, copies: int) -> Any:
    """Our decode kernel over caches in our layout."""
    import torch

    from vllm_instant_kernels.paged_attention import paged_attention, workspace_for

    workspace = workspace_for(query.device, HEAD)
    calls = []
    for _ in range(copies):
        views = cache(blocks)
        keywords = {"max_query_tokens": tokens, "scale": HEAD**-0.5, "workspace": workspace}
        output = torch.empty_like(query)
        calls.append(replayed(partial(paged_attention, query, views, tables, lengths, starts, output, **keywords)))
    return calls


def stock(
    module: Any, query: Any, tables: Any, lengths: Any, starts: Any, tokens: int, blocks: int, copies: int, context: int
) -> Any:
    """VLLM's unified attention over its own FP8 layout."""
    import torch

    calls = []
    sums = module.sums_for(len(query), query.shape[1], HEAD, query.device)
    for _ in range(copies):
        views = module.views(_fp8((blocks, KV_HEADS, BLOCK, module.row_bytes(HEAD))), HEAD)
        views.key_scales.fill_(0.01)
        views.value_scales.fill_(0.01)
        call = partial(
            module.attend,
            module.kernel_module(),
            query,
            views,
            tables,
            lengths,
            starts,
            torch.empty_like(query),
            max_query_tokens=tokens,
            longest=context,
            sums=sums,
        )
        calls.append(replayed(call))
    return calls


def sdpa(
    module: Any, query: Any, tables: Any, lengths: Any, starts: Any, tokens: int, blocks: int, copies: int, context: int
) -> Any:
    """PyTorch's SDPA over BF16 keys and values that lie dense."""
    import torch

    calls = []
    batch = len(lengths)
    of_requests = query.view(batch, 1, -1, HEAD).transpose(1, 2)
    for _ in range(max(1, copies // 2)):
        shape = (batch, KV_HEADS, context, HEAD)
        keys, values = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        attend = partial(torch.nn.functional.scaled_dot_product_attention, of_requests, keys, values, enable_gqa=True)
        calls.append(replayed(attend))
    return calls


def flash_attn(
    module: Any, query: Any, tables: Any, lengths: Any, starts: Any, tokens: int, blocks: int, copies: int, context: int
) -> Any:
    """FlashAttention over a paged BF16 cache."""
    import torch

    calls = []
    # Its pages are at least 256 tokens.
    pages = torch.arange(len(lengths) * (context // 256), dtype=torch.int32, device="cuda").view(len(lengths), -1)
    for _ in range(max(1, copies // 2)):
        shape = (pages.numel(), 256, KV_HEADS, HEAD)
        keys, values = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        call = partial(
            module.flash_attn_with_kvcache,
            query.view(len(lengths), 1, -1, HEAD),
            keys,
            values,
            cache_seqlens=lengths,
            block_table=pages,
            causal=True,
        )
        calls.append(replayed(call))
    return calls


def flashinfer(
    module: Any, query: Any, tables: Any, lengths: Any, starts: Any, tokens: int, blocks: int, copies: int, context: int
) -> Any:
    """FlashInfer over a paged BF16 cache, planned before."""
    import torch

    calls = []
    batch = len(lengths)
    for _ in range(max(1, copies // 2)):
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        pages = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * (context // BLOCK)
        last = torch.full((batch,), BLOCK, dtype=torch.int32, device="cuda")
        wrapper.plan(
            pages,
            tables.flatten(),
            last,
            query.shape[1],
            KV_HEADS,
            HEAD,
            BLOCK,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        cache = torch.randn(blocks, 2, BLOCK, KV_HEADS, HEAD, dtype=torch.bfloat16, device="cuda")
        calls.append(replayed(partial(wrapper.run, query, cache)))
    return calls


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
    arms: dict[str, list[Callable[[], Any]]] = {"ours": ours(query, tables, lengths, starts, tokens, blocks, copies)}
    cell: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "group": group,
        "query_tokens": tokens,
        "bytes": our_bytes,
        "bytes_bf16": plain_bytes,
    }
    for name, make in (
        ("vllm", stock),
        ("flashinfer", flashinfer),
        ("flash_attn", flash_attn),
        ("sdpa", sdpa),
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
        views = cache(blocks)
        call = partial(prefill_attention, query, views, tables, lengths, starts, torch.empty_like(query))
        calls.append(replayed(partial(call, scale=HEAD**-0.5, workspace=workspace)))
    arms: dict[str, Any] = {"ours": calls}
    if modules["vllm"] is not None:
        arms["vllm"] = stock(modules["vllm"], query, tables, lengths, starts, piece, blocks, copies, total)
    return {"piece": piece, "context": context, "us": summary(times(arms, runs))}
