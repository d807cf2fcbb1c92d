"""Compiles every kernel ahead of time for devices that are not present, and counts what its machine code takes.

One row per kernel, case and compute capability: registers, spills, shared memory, loads by width, tensor core
instructions. vLLM's own unified attention is compiled in the same way, as vLLM launches it and with larger tiles.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90, 100)
KV_HEADS, REQUESTS = 8, 4
STOCK = "vLLM unified attention"
Row = dict[str, Any]

ATTENTION = {
    "FP8, head 64, group 4, 1 token": (64, 4, 1, {}),
    "FP8, head 96, group 3, 1 token": (96, 3, 1, {}),
    "FP8, head 128, group 4, 1 token": (128, 4, 1, {}),
    "FP8, head 128, group 4, 5 tokens": (128, 4, 5, {}),
    "FP8, head 128, group 8, 16 tokens": (128, 8, 16, {}),
    "FP8, head 256, group 4, 5 tokens": (256, 4, 5, {}),
    "FP8, head 128, group 4, 1 token, window, soft cap": (128, 4, 1, {"window": 4096, "soft_cap": 50.0}),
    "BF16, head 128, group 4, 1 token": (128, 4, 1, {"plain": True}),
}
PREFILL = {"FP8, head 128, group 4": (128, 4), "FP8, head 256, group 4": (256, 4)}
WRITE = {"FP8, head 128, rotated": (128, True), "FP8, head 128": (128, False), "FP8, head 96, rotated": (96, True)}
FEED_FORWARD = {
    f"{kind}, 1B, {name}": (2048, 8192, kind == "FP8", name)
    for kind in ("BF16", "FP8")
    for name in ("_project", "_gate_and_up", "_down")
}
STOCK_CASES = {
    "FP8, head 128, group 4, 1 token": (1, None),
    "FP8, head 128, group 4, 1 token, tiles of 64": (1, 64),
    "FP8, head 128, group 4, 5 tokens": (5, None),
    "FP8, head 128, group 4, 5 tokens, tiles of 64": (5, 64),
}


def cases() -> list[tuple[str, str, int]]:
    """Everything that is compiled: kernel, case, capability."""
    ours = {
        "paged_attention": ATTENTION,
        "prefill_attention": PREFILL,
        "rope_quantize_write": WRITE,
        "fused_feed_forward": FEED_FORWARD,
    }
    listed = [(kernel, case, capability) for kernel, of in ours.items() for case in of for capability in CAPABILITIES]
    # Capability 8.0 has no FP8 numbers, which vLLM's kernel needs.
    return listed + [(STOCK, case, capability) for case in STOCK_CASES for capability in CAPABILITIES[1:]]


def table() -> list[Row]:
    """One row per case, compiled in two processes."""
    listed = cases()
    # Importing vLLM takes seconds: all of its cases go to one process.
    groups = [[case] for case in listed if case[0] != STOCK]
    groups.insert(0, [case for case in listed if case[0] == STOCK])
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        rows = [row for part in pool.map(_rows, groups) for row in part]
    return sorted(rows, key=lambda row: listed.index((row["kernel"], row["case"], row["capability"])))


def _rows(group: list[tuple[str, str, int]]) -> list[Row]:
    return [row(*case) for case in group]


def row(kernel: str, case: str, capability: int) -> Row:
    """Compile one case."""
    import ahead_of_time

    launch = _LAUNCHES[kernel](case, capability)
    with tempfile.TemporaryDirectory() as folder:
        machine = ahead_of_time.compiled(launch, capability, Path(folder))
    return {
        "kernel": kernel,
        "case": case,
        "capability": capability,
        "registers": machine.registers,
        "spilled": machine.spilled,
        "shared": machine.shared,
        "loads": {str(width): times for width, times in machine.loads().items()},
        "tensor_cores": machine.products(),
    }


def _batch(head: int, group: int, tokens: int, plain: bool = False) -> Any:
    import torch
    from attention_cases import QUANTIZED, batch

    return batch(
        0,
        [(40, tokens)] * REQUESTS,
        head=head,
        kv_heads=KV_HEADS,
        group=group,
        dtype=torch.bfloat16,
        cache_dtype=torch.bfloat16 if plain else QUANTIZED,
    )


def _all(module: Any, function: Callable[[], Any]) -> list[Any]:
    import ahead_of_time

    return ahead_of_time.launches(module, function)


def _one(module: Any, function: Callable[[], Any]) -> Any:
    [launch] = _all(module, function)
    return launch


def _paged(case: str, capability: int) -> Any:
    import torch

    from vllm_instant_kernels import attention_launch
    from vllm_instant_kernels import paged_attention as module
    from vllm_instant_kernels.cache_layout import split

    head, group, tokens, options = ATTENTION[case]
    options = dict(options)
    made = _batch(head, group, tokens, bool(options.pop("plain", False)))
    arguments = (
        split(made.cache, head, converts=capability >= 89),
        made.block_tables,
        made.lengths,
        made.starts,
        torch.empty_like(made.query),
    )
    workspace = module.workspace_for(made.query.device, head)
    keywords = {"max_query_tokens": tokens, "scale": 0.1, "workspace": workspace, "splits": 8, **options}
    return _one(attention_launch, partial(module.paged_attention, made.query, *arguments, **keywords))


def _prefill(case: str, capability: int) -> Any:
    import torch

    from vllm_instant_kernels import attention_launch
    from vllm_instant_kernels import prefill_attention as module
    from vllm_instant_kernels.cache_layout import split
    from vllm_instant_kernels.paged_attention import workspace_for

    head, group = PREFILL[case]
    made = _batch(head, group, 33)
    arguments = (
        split(made.cache, head, converts=capability >= 89),
        made.block_tables,
        made.lengths,
        made.starts,
        torch.empty_like(made.query),
    )
    keywords = {"scale": 0.1, "workspace": workspace_for(made.query.device, head), "splits": 4}
    return _one(attention_launch, partial(module.prefill_attention, made.query, *arguments, **keywords))


def _write(case: str, capability: int) -> Any:
    import torch

    from vllm_instant_kernels import rope_quantize_write as module
    from vllm_instant_kernels.cache_layout import split

    head, rotates = WRITE[case]
    made = _batch(head, 4, 2)
    views = split(made.cache, head, converts=capability >= 89)
    together = torch.zeros(8, 6 * KV_HEADS, head, dtype=torch.bfloat16)
    query, key, value = together.split([4 * KV_HEADS, KV_HEADS, KV_HEADS], 1)
    slots = torch.arange(8)
    if not rotates:
        return _one(module, partial(module.quantize_write, key, value, views, slots))
    angles = torch.zeros(64, head, dtype=torch.bfloat16)
    arguments = (query, key, value, views, slots, slots, angles, torch.empty_like(query))
    return _one(module, partial(module.rope_quantize_write, *arguments))


def _feed_forward(case: str, capability: int) -> Any:
    import torch

    from vllm_instant_kernels import fused_feed_forward as module

    hidden, inner, is_fp8, name = FEED_FORWARD[case]

    def weight(outputs: int, inputs: int) -> Any:
        if not is_fp8:
            return module.Weight(torch.empty(outputs, inputs, dtype=torch.bfloat16))
        kind = torch.float8_e4m3fn if capability >= 89 else torch.uint8
        return module.Weight(torch.empty(outputs, inputs, dtype=kind), torch.empty(outputs))

    rows = torch.zeros(5, hidden, dtype=torch.bfloat16)
    weights = module.FeedForwardWeights(
        weight(hidden, hidden), rows[0], weight(2 * inner, hidden), weight(hidden, inner)
    )
    launches = _all(module, partial(module.fused_feed_forward, rows, rows, weights))
    return next(launch for launch in launches if launch.name == name)


def _stock(case: str, capability: int) -> Any:
    """The kernel of vLLM over the layout of vLLM, decoding or verifying drafts, as its host function launches it."""
    import stock_attention
    import torch

    module = stock_attention.kernel_module()
    tokens, tile = STOCK_CASES[case]
    made = _batch(128, 4, tokens)
    cache = torch.zeros(*made.cache.shape[:3], stock_attention.row_bytes(128), dtype=torch.uint8)
    sums = stock_attention.sums_for(len(made.query), made.query.shape[1], 128, cache.device)
    arguments = (made.query, stock_attention.views(cache, 128), made.block_tables, made.lengths, made.starts)
    keywords = {"max_query_tokens": tokens, "longest": 40, "sums": sums}
    chosen = module._get_tile_size
    if tile is not None:
        module._get_tile_size = lambda *_, **__: tile
    try:
        output = torch.empty_like(made.query)
        return _all(module, partial(stock_attention.attend, module, *arguments, output, **keywords))[0]
    finally:
        module._get_tile_size = chosen


_LAUNCHES: dict[str, Callable[[str, int], Any]] = {
    "paged_attention": _paged,
    "prefill_attention": _prefill,
    "rope_quantize_write": _write,
    "fused_feed_forward": _feed_forward,
    STOCK: _stock,
}


def printed(rows: Iterable[Row]) -> str:
    """The rows as a text table."""
    lines = [
        f"{'kernel':24} {'case':52} {'sm':>4} {'regs':>5} {'spill':>6} {'shared':>7} {'tensor':>7}  loads by bytes"
    ]
    for r in rows:
        loads = " ".join(f"{width}:{times}" for width, times in r["loads"].items())
        lines.append(
            f"{r['kernel']:24} {r['case']:52} {r['capability']:>4} {r['registers']:>5} {r['spilled']:>6} "
            f"{r['shared']:>7} {r['tensor_cores']:>7}  {loads}"
        )
    return "\n".join(lines)
