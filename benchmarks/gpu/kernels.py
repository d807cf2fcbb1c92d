"""Attention over an FP8 cache and the fused feed-forward on a GPU: right first, then how fast.

    python benchmarks/gpu/kernels.py [--runs 50] [--quick]

Needs PyTorch and Triton with a CUDA device of compute capability 8.9 or later; this project need not be installed.
Where vLLM, FlashInfer or FlashAttention are importable they are measured, too; what is missing is named.

First every operation is compared with a reference on the device, and the merge of parts runs ten thousand times. Then
the device's copy bandwidth is measured, and with it as the measure, as CUDA graphs, arms in turns, on buffers that
change from round to round and together do not fit into the L2 cache:

    decode        batch 1 to 128, context 1k to 64k, groups of 4 and 8: ours, vLLM's unified attention over its own FP8
                  layout, PyTorch's SDPA over BF16 keys that lie dense, FlashInfer and FlashAttention over paged BF16
    verification  the same with 5 query tokens a request, where vLLM is the rival
    prefill       pieces of 16 to 256 tokens behind 8k and 32k others
    feed-forward  1 to 16 rows of a 1B model's layer: ours, and the same as separate operations of PyTorch

The table of all of it comes last; everything goes to ``benchmarks/results/kernels.json``.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from timing import ROOT, can_run, graph, summary, times, write

HEAD, KV_HEADS, BLOCK = 128, 8, 16
BATCHES = (1, 4, 16, 32, 64, 128)
CONTEXTS = (1024, 8192, 32_768, 65_536)
GROUPS = (4, 8)
ROTATED_BYTES = 256 << 20
"""Buffers that take turns are together at least this large, several times an L2 cache."""
LAUNCHES = 10_000
ALLOWED = 1e-3
"""Largest error of float16 results against the cache as it is."""


# ------------------------------------------------------------------------------------------------- right


def compare() -> dict[str, Any]:
    """Every operation against its reference on the device; raises SystemExit where one is wrong."""
    import torch
    from attention_cases import attended, batch, largest_error, random_requests, written
    from attention_reference import paged_attention_reference, write_reference
    from feed_forward_cases import fed_forward, feed_forward_reference, matrices

    from vllm_instant_kernels.cache_layout import split

    seed = random.SystemRandom().randrange(2**31)
    numbers = random.Random(seed)
    worst = {"paged_attention": 0.0, "prefill_attention": 0.0, "fused_feed_forward": 0.0}
    for head in (64, 96, 128, 256):
        for group in (1, 3, 4, 8):
            requests = random_requests(numbers, [1, 15, 16, 17, 1023, 6000], 16)
            made = batch(numbers.randrange(2**31), requests, head=head, group=group, dtype=torch.float16)
            expected = torch.full_like(made.query, torch.nan, dtype=torch.float64)
            arguments = (made.block_tables, made.lengths, made.starts)
            paged_attention_reference(
                made.query, split(made.cache, head, False), *arguments, expected, scale=head**-0.5
            )
            on_device = [t.cuda() for t in (made.query, made.cache, *arguments)]
            for kernel in ("paged_attention", "prefill_attention"):
                for splits in (None, 1, 4 if kernel == "paged_attention" else 2):
                    found, arrivals = attended(kernel, *on_device, head, 16, {}, splits)
                    if arrivals.any():
                        raise SystemExit(f"{kernel}: counters are not back at 0 (seed {seed})")
                    worst[kernel] = max(worst[kernel], largest_error(found.cpu(), expected))
        key, value = (torch.randn(40, KV_HEADS, head, dtype=torch.float16) for _ in range(2))
        blank = torch.zeros(4, KV_HEADS, BLOCK, 2 * head + 16, dtype=torch.uint8)
        slots = torch.randperm(64)[:40]
        (found,) = written(key.cuda(), value.cuda(), blank.cuda(), slots.cuda(), head)
        write_reference(key, value, split(blank, head, False), slots)
        # Scales may differ in the last bit, and a number that lies halfway by a step.
        different = float((found.cpu() != blank).float().mean())
        if different > 1e-3:
            raise SystemExit(f"rope_quantize_write: {different:.2%} of the bytes are not the reference's (seed {seed})")
    for rows in (1, 7, 16):
        for fp8 in (False, True):
            made = matrices(seed, 1024, 1024, 2816, fp8, torch.float16)
            attention, residual = (torch.randn(rows, 1024, dtype=torch.float16) for _ in range(2))
            norm = torch.rand(1024, dtype=torch.float16)
            expected = feed_forward_reference(attention, residual, norm, made, 1e-5)
            moved = [
                (w.cuda() if s is None else w.cuda().view(torch.float8_e4m3fn), None if s is None else s.cuda())
                for w, s in made
            ]
            (found,) = fed_forward(attention.cuda(), residual.cuda(), norm.cuda(), moved, 4)
            error = float((found.cpu() - expected).norm() / expected.norm())
            worst["fused_feed_forward"] = max(worst["fused_feed_forward"], error)
    print("largest errors:", ", ".join(f"{name} {error:.1e}" for name, error in worst.items()))
    for name, error in worst.items():
        if not error <= (3e-3 if name == "fused_feed_forward" else ALLOWED):
            raise SystemExit(f"{name}: the largest error is {error:.1e} (seed {seed})")
    return {"seed": seed, "largest_errors": worst, "merges": merges(numbers)}


def merges(numbers: random.Random) -> int:
    """Merge parts many times: whoever does it, the sum's order and so the outcome is the same; returns how often."""
    import torch
    from attention_cases import batch

    from vllm_instant_kernels.cache_layout import split
    from vllm_instant_kernels.paged_attention import paged_attention, workspace_for

    made = batch(numbers.randrange(2**31), [(6000, 3), (700, 1), (2048, 4), (1, 1)], dtype=torch.float16)
    query, cache, *others = (t.cuda() for t in (made.query, made.cache, made.block_tables, made.lengths, made.starts))
    views, workspace = split(cache, made.head), workspace_for(query.device, made.head)
    keywords = {"most_query_tokens": 4, "scale": made.head**-0.5, "workspace": workspace}
    first: dict[int, Any] = {}
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(LAUNCHES):
        splits = numbers.choice([2, 4, 8, 16])
        output = torch.full_like(query, torch.nan)
        paged_attention(query, views, *others, output, splits=splits, **keywords)
        wrong += (output != first.setdefault(splits, output)).any()
    if int(wrong):
        raise SystemExit(f"{int(wrong)} of {LAUNCHES} merges differ")
    return LAUNCHES


# -------------------------------------------------------------------------------------------------- fast


def copy_bandwidth(runs: int) -> float:
    """Bytes a second that a copy of 1 GiB moves, read and written, median."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = times({"copy": [replayed(partial(target.copy_, source))]}, runs)
    return 2 * (1 << 30) / (summary(found)["copy"]["median"] * 1e-6)


def replayed(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call as a CUDA graph; the tensors that it was captured with live as long as the result."""
    return partial(_replay, graph(call), call)


def _replay(captured: Any, _kept: Any) -> None:
    captured.replay()


def rivals() -> dict[str, Any]:
    """Modules that can be measured beside ours, None where they are not importable."""
    import importlib

    found: dict[str, Any] = {}
    for name, module in (("vllm", "stock_attention"), ("flashinfer", "flashinfer"), ("flash_attn", "flash_attn")):
        try:
            found[name] = importlib.import_module(module)
            if name == "vllm":
                found[name].kernel_module()
        # Somebody else's package can fail to load in any way.
        except Exception as error:
            print(f"{name} is not measured: {type(error).__name__}: {error}")
            found[name] = None
    return found


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
    arms: dict[str, list[Callable[[], Any]]] = {"ours": _ours(query, tables, lengths, starts, tokens, blocks, copies)}
    cell: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "group": group,
        "query_tokens": tokens,
        "bytes": our_bytes,
        "bytes_bf16": plain_bytes,
    }
    for name, make in (("vllm", _stock), ("flashinfer", _flashinfer), ("flash_attn", _flash_attn), ("sdpa", _sdpa)):
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


def _fp8(shape: tuple[int, ...]) -> Any:
    """Bytes that are finite E4M3 numbers, drawn once and repeated."""
    import torch

    size = 1
    for extent in shape:
        size *= extent
    some = torch.randint(0, 0x58, (min(size, 1 << 24),), dtype=torch.uint8, device="cuda")
    return some.repeat(-(-size // len(some)))[:size].view(shape)


def _cache(blocks: int) -> Any:
    """A cache in our layout with made-up content."""
    from vllm_instant_kernels.cache_layout import row_bytes, split

    views = split(_fp8((blocks, KV_HEADS, BLOCK, row_bytes(HEAD))), HEAD)
    for scales in (views.key_scales, views.value_scales):
        if scales is not None:
            scales.fill_(0.01)
    return views


def _ours(query: Any, tables: Any, lengths: Any, starts: Any, tokens: int, blocks: int, copies: int) -> Any:
    import torch

    from vllm_instant_kernels.paged_attention import paged_attention, workspace_for

    workspace = workspace_for(query.device, HEAD)
    calls = []
    for _ in range(copies):
        views = _cache(blocks)
        keywords = {"most_query_tokens": tokens, "scale": HEAD**-0.5, "workspace": workspace}
        output = torch.empty_like(query)
        calls.append(replayed(partial(paged_attention, query, views, tables, lengths, starts, output, **keywords)))
    return calls


def _stock(
    module: Any, query: Any, tables: Any, lengths: Any, starts: Any, tokens: int, blocks: int, copies: int, context: int
) -> Any:
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
            most_query_tokens=tokens,
            longest=context,
            sums=sums,
        )
        calls.append(replayed(call))
    return calls


def _sdpa(
    module: Any, query: Any, tables: Any, lengths: Any, starts: Any, tokens: int, blocks: int, copies: int, context: int
) -> Any:
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


def _flash_attn(
    module: Any, query: Any, tables: Any, lengths: Any, starts: Any, tokens: int, blocks: int, copies: int, context: int
) -> Any:
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


def _flashinfer(
    module: Any, query: Any, tables: Any, lengths: Any, starts: Any, tokens: int, blocks: int, copies: int, context: int
) -> Any:
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
        views = _cache(blocks)
        call = partial(prefill_attention, query, views, tables, lengths, starts, torch.empty_like(query))
        calls.append(replayed(partial(call, scale=HEAD**-0.5, workspace=workspace)))
    arms: dict[str, Any] = {"ours": calls}
    if modules["vllm"] is not None:
        arms["vllm"] = _stock(modules["vllm"], query, tables, lengths, starts, piece, blocks, copies, total)
    return {"piece": piece, "context": context, "us": summary(times(arms, runs))}


def feed_forward(rows: int, fp8: bool, runs: int) -> dict[str, Any]:
    """A 1B model's layer, weights of several layers in turn; the rival is BF16 with separate operations."""
    import torch

    from vllm_instant_kernels.fused_feed_forward import FeedForwardWeights, Weight, fused_feed_forward

    hidden, inner, layers = 2048, 8192, 4
    attention, residual = (torch.randn(rows, hidden, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    norm = torch.ones(hidden, dtype=torch.bfloat16, device="cuda")

    def weight(outputs: int, inputs: int) -> tuple[Any, Weight]:
        plain = torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") * inputs**-0.5
        if not fp8:
            return plain, Weight(plain)
        scales = (plain.float().abs().amax(1) / 448).clamp(min=1e-6)
        return plain, Weight((plain.float() / scales[:, None]).to(torch.float8_e4m3fn), scales)

    def separate(output: Any, both: Any, down: Any) -> Any:
        x = residual + attention @ output.T
        gate, up = (torch.nn.functional.rms_norm(x, (hidden,), norm, 1e-5) @ both.T).chunk(2, -1)
        return x + (torch.nn.functional.silu(gate) * up) @ down.T

    arms: dict[str, list[Callable[[], Any]]] = {"ours": [], "separate": []}
    for _ in range(layers):
        (o, our_o), (b, our_b), (d, our_d) = weight(hidden, hidden), weight(2 * inner, hidden), weight(hidden, inner)
        weights = FeedForwardWeights(our_o, norm, our_b, our_d)
        arms["ours"].append(replayed(partial(fused_feed_forward, attention, residual, weights)))
        arms["separate"].append(replayed(partial(separate, o, b, d)))
    return {"rows": rows, "weights": "FP8" if fp8 else "BF16", "us": summary(times(arms, runs))}


# ------------------------------------------------------------------------------------------------- table


def printed(measured: dict[str, Any]) -> str:
    """All cells, a line each."""
    bandwidth = measured["copy_bandwidth"]
    lines = [f"copy bandwidth {bandwidth / 1e12:.2f} TB/s"]
    for cell in measured["decode"]:
        share = cell["bytes"] / (cell["us"]["ours"]["median"] * 1e-6) / bandwidth
        lines.append(
            f"batch {cell['batch']:>3}, context {cell['context']:>6}, group {cell['group']}, "
            f"{cell['query_tokens']} query tokens: {_figures(cell)}; {share:.0%} of the copy bandwidth"
        )
    for cell in measured["prefill"]:
        lines.append(f"piece of {cell['piece']:>3} behind {cell['context']:>6}: {_figures(cell)}")
    for cell in measured["feed_forward"]:
        lines.append(f"feed-forward, {cell['rows']:>2} rows, {cell['weights']} weights: {_figures(cell)}")
    return "\n".join(lines)


def _figures(cell: dict[str, Any]) -> str:
    return (
        ", ".join(f"{arm} {x['median']:.1f} [{x['low']:.1f}, {x['high']:.1f}]" for arm, x in cell["us"].items()) + " µs"
    )


def main() -> int:
    """Compare, measure, print, write ``benchmarks/results/kernels.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="a few cells of the grid only")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/kernels.json")
    options = parser.parse_args()
    if not can_run():
        return 2
    import torch

    if torch.cuda.get_device_capability() < (8, 9):
        print("This needs a device of compute capability 8.9 or later.", file=sys.stderr)
        return 2
    measured: dict[str, Any] = {"runs": options.runs, "head": HEAD, "kv_heads": KV_HEADS, "compared": compare()}
    modules = rivals()
    measured["copy_bandwidth"] = copy_bandwidth(options.runs)
    measured["decode"], measured["prefill"], measured["feed_forward"] = [], [], []
    room = torch.cuda.mem_get_info()[0]
    for group in GROUPS[:1] if options.quick else GROUPS:
        for batch in (1, 16) if options.quick else BATCHES:
            for context in CONTEXTS[:2] if options.quick else CONTEXTS:
                # Two FP8 caches and three of BF16, and some room to make them.
                if batch * context * KV_HEADS * HEAD * 20 > room:
                    continue
                for tokens in (1, 5):
                    measured["decode"].append(decode(batch, context, group, tokens, options.runs, modules))
                    print(printed({**measured, "decode": measured["decode"][-1:]}).splitlines()[-1], flush=True)
                    torch.cuda.empty_cache()
    for context in (8192,) if options.quick else (8192, 32_768):
        for piece in (16, 64, 256):
            measured["prefill"].append(prefill(piece, context, options.runs, modules))
            torch.cuda.empty_cache()
    for rows in (1, 4, 8, 16):
        for fp8 in (False, True):
            measured["feed_forward"].append(feed_forward(rows, fp8, options.runs))
            torch.cuda.empty_cache()
    print(printed(measured))
    write(options.output, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
