"""Every kernel against its reference on a device, and ten thousand merges of partial results."""

from __future__ import annotations

import random
from typing import Any

from timing import BLOCK, KV_HEADS

LAUNCHES = 10_000
ALLOWED = 1e-3
"""Largest relative error of float16 results against the same quantised cache."""


def compare() -> dict[str, Any]:
    """Every operation against its reference on the device; raises SystemExit where one is wrong."""
    import torch
    from attention_cases import attended, batch, largest_error, random_requests, written
    from attention_reference import paged_attention_reference, write_reference
    from feed_forward_cases import fed_forward, fed_forward_parts, feed_forward_parts_reference, matrices

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
            added, x = feed_forward_parts_reference(attention, residual, norm, made, 1e-5)
            moved = [
                (w.cuda() if s is None else w.cuda().view(torch.float8_e4m3fn), None if s is None else s.cuda())
                for w, s in made
            ]
            on_device = attention.cuda(), residual.cuda(), norm.cuda()
            *parts, counters = fed_forward_parts(*on_device, moved, 4)
            if counters.any():
                raise SystemExit(f"fused_feed_forward: counters are not back at 0 (seed {seed})")
            all_found = (*fed_forward(*on_device, moved, 4), *parts)
            for found, expected in zip(all_found, (x + added, added, x), strict=True):
                error = float((found.cpu() - expected).norm() / expected.norm())
                worst["fused_feed_forward"] = max(worst["fused_feed_forward"], error)
    print("largest errors:", ", ".join(f"{name} {error:.1e}" for name, error in worst.items()))
    for name, error in worst.items():
        if not error <= (3e-3 if name == "fused_feed_forward" else ALLOWED):
            raise SystemExit(f"{name}: the largest error is {error:.1e} (seed {seed})")
    return {"seed": seed, "largest_errors": worst, "merges": merges(numbers)}


def merges(numbers: random.Random) -> int:
    """Merge parts many times: the order of the sum, and so the result, must not depend on which program merges."""
    import torch
    from attention_cases import batch

    from vllm_instant_kernels.cache_layout import split
    from vllm_instant_kernels.paged_attention import paged_attention, workspace_for

    made = batch(numbers.randrange(2**31), [(6000, 3), (700, 1), (2048, 4), (1, 1)], dtype=torch.float16)
    query, cache, *others = (t.cuda() for t in (made.query, made.cache, made.block_tables, made.lengths, made.starts))
    views, workspace = split(cache, made.head), workspace_for(query.device, made.head)
    keywords = {"max_query_tokens": 4, "scale": made.head**-0.5, "workspace": workspace}
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
