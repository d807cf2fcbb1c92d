"""Block verification on a GPU: right, and how fast beside plain tensor operations and beside the softmax before it.

    python benchmarks/gpu/block_verification.py [--runs 300]

Needs PyTorch and Triton with a CUDA device; neither vLLM nor this project has to be installed. First the kernels are
compared with the reference on the device, drafts of all lengths, padding and odd vocabularies included. Then 16
requests with 8 drafts each are timed at vocabularies of 32,000 and 150,000, each arm in every round, on inputs that
change from round to round:

    kernels    ``verify_blocks``
    tensors    the same algorithm in plain tensor operations, without waiting for the device either
    softmax    the target's softmax alone, over the rows of the drafts

once launched from Python and once replayed as a CUDA graph, which leaves the time on the device.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from timing import ROOT, can_run, graph, summary, times, write

BATCH, DRAFTED = 16, 8
VOCABULARIES = (32_000, 150_000)
INPUTS = 4
"""Different inputs of each size, in turn: a cache that still holds the last round's would flatter all arms."""
MAX_DIFFERENT = 1e-3
"""Share of requests whose outcome may differ from the reference's: another order of a sum can turn a close decision."""


def inputs(lengths: Sequence[int], vocab: int, certain: bool, seed: int, padded: float = 0.0) -> dict[str, Any]:
    """Arguments of ``verify_blocks`` on the device, and the target's ``logits``.

    In each row one token is about as likely as all others together; target and draft differ by unit normal noise in
    their logits. Drafts are drawn from the draft's distribution, or are its likeliest tokens if they are ``certain``.
    """
    import torch

    generator = torch.Generator("cuda").manual_seed(seed)
    rows = sum(lengths)
    draft_logits = 3.0 * torch.randn(rows, vocab, generator=generator, device="cuda")
    favourite = torch.randint(vocab, (rows, 1), generator=generator, device="cuda")
    draft_logits.scatter_(1, favourite, draft_logits.logsumexp(-1, keepdim=True))
    logits = draft_logits + torch.randn(rows, vocab, generator=generator, device="cuda")
    q = draft_logits.softmax(-1)
    drafts = q.argmax(-1) if certain else q.multinomial(1, generator=generator)[:, 0]
    drafts[torch.rand(rows, generator=generator, device="cuda") < padded] = -1
    return {
        "logits": logits,
        "arguments": (
            drafts.to(torch.int32),
            torch.tensor(lengths, device="cuda").cumsum(0).to(torch.int32),
            None if certain else q,
            logits.softmax(-1),
            torch.rand(rows, generator=generator, device="cuda"),
            torch.empty(len(lengths), vocab, device="cuda").exponential_(generator=generator),
        ),
    }


def with_tensors(
    draft_token_ids: Any, ends: Any, draft_probs: Any, target_probs: Any, uniforms: Any, noise: Any, *, longest: int
) -> tuple[Any, Any]:
    """What ``verify_blocks`` does, in tensor operations; ``longest`` is the most drafts of a request."""
    import torch

    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    positions = torch.arange(longest, device=ends.device)
    lengths = (ends - starts)[:, None]
    at = (starts[:, None] + positions).clamp(max=len(draft_token_ids) - 1).long()
    drafts = torch.where(positions < lengths, draft_token_ids[at].long(), -1)
    is_real = (drafts >= 0).cumprod(1).bool()
    real = is_real.sum(1, keepdim=True)
    tokens = drafts.clamp(min=0)

    ratios = target_probs[at, tokens]
    if draft_probs is not None:
        q = draft_probs[at, tokens]
        ratios = torch.where(q > 0, ratios / q, 0.0)
    weights = [noise.new_ones(len(ends))]
    for position in range(longest):
        weights.append((weights[-1] * ratios[:, position]).clamp(max=1.0))
    weight = torch.stack(weights, 1)

    by_row = torch.where(is_real, weight[:, :-1], 0.0)
    if draft_probs is None:
        mass = by_row * (1 - target_probs[at, tokens]).clamp(min=0.0)
    else:
        # All rows at once: this is what reads and writes the tables several times.
        flat = torch.zeros_like(uniforms).scatter_add_(0, at.flatten(), by_row.flatten())
        mass = (flat[:, None] * target_probs - draft_probs).clamp(min=0.0).sum(1)[at]
    total = mass + (1 - by_row)
    chances = torch.where(total > 0, mass / total, 1.0)
    prefixes = positions[1:]
    chances = torch.where(prefixes < real, chances[:, 1:], torch.where(prefixes == real, weight[:, 1:-1], 0.0))
    chances = torch.cat([chances, torch.where(real == longest, weight[:, -1:], 0.0)], 1)
    kept = torch.where(uniforms[at] < chances, positions + 1, 0).amax(1, keepdim=True)

    row = (starts[:, None] + kept).clamp(max=len(draft_token_ids) - 1)[:, 0].long()
    p = target_probs[row]
    refused = drafts.gather(1, kept.clamp(max=longest - 1))
    if draft_probs is None:
        residual = p.scatter(1, refused.clamp(min=0), 0.0)
    else:
        residual = (weight.gather(1, kept) * p - draft_probs[row]).clamp(min=0.0)
    whole = (refused < 0) | ~(residual > 0).any(1, keepdim=True)
    token = (torch.where(whole, p, residual) / noise).argmax(1, keepdim=True)
    return kept[:, 0].int(), torch.where(kept < lengths, token, -1)[:, 0].int()


def compare() -> list[dict[str, Any]]:
    """Both implementations against the reference; raises SystemExit where more differs than rounding explains."""
    from block_verification_reference import verify_blocks_reference

    from vllm_instant_kernels.block_verification import verify_blocks

    compared: list[dict[str, Any]] = []
    numbers = random.Random(0)
    for certain in (False, True):
        for vocab in (37, 1000, 5003, *VOCABULARIES):
            requests, different = 0, {"kernels": 0, "tensors": 0}
            for seed in range(8):
                lengths = [numbers.randint(0, DRAFTED) for _ in range(BATCH - 1)] + [DRAFTED]
                arguments = inputs(lengths, vocab, certain, seed, padded=0.05)["arguments"]
                expected = [x.tolist() for x in verify_blocks_reference(*arguments)]
                requests += len(lengths)
                found = {"kernels": verify_blocks(*arguments), "tensors": with_tensors(*arguments, longest=DRAFTED)}
                for arm, results in found.items():
                    pairs = zip(*(x.tolist() for x in results), strict=True)
                    different[arm] += sum(a != b for a, b in zip(pairs, zip(*expected, strict=True), strict=True))
            compared.append({"certain": certain, "vocabulary": vocab, "requests": requests, "different": different})
            print(json.dumps(compared[-1]))
    for arm in ("kernels", "tensors"):
        share = sum(cell["different"][arm] for cell in compared) / sum(cell["requests"] for cell in compared)
        if share > MAX_DIFFERENT:
            raise SystemExit(f"{arm}: the outcome of {share:.2%} of the requests is not the reference's")
    return compared


def measure(vocab: int, certain: bool, runs: int) -> dict[str, Any]:
    """Microseconds of all arms, launched from Python and replayed as graphs, each arm in every round."""
    import torch

    from vllm_instant_kernels.block_verification import verify_blocks

    cases = [inputs([DRAFTED] * BATCH, vocab, certain, seed) for seed in range(INPUTS)]
    arms: dict[str, list[Callable[[], Any]]] = {"kernels": [], "tensors": [], "softmax": []}
    for case in cases:
        arguments, logits = case["arguments"], case["logits"]
        arms["kernels"].append(partial(verify_blocks, *arguments))
        arms["tensors"].append(partial(with_tensors, *arguments, longest=DRAFTED))
        arms["softmax"].append(partial(torch.softmax, logits, -1, dtype=torch.float32))
    kept = [int(x) for case in cases for x in verify_blocks(*case["arguments"])[0]]
    cell: dict[str, Any] = {
        "certain": certain,
        "vocabulary": vocab,
        "kept": statistics.fmean(kept),
        "requests_with_a_draw": statistics.fmean(k < DRAFTED for k in kept),
        "launched_us": summary(times(arms, runs)),
    }
    graphs = {arm: [graph(function).replay for function in functions] for arm, functions in arms.items()}
    cell["replayed_us"] = summary(times(graphs, runs))
    return cell


def main() -> int:
    """Compare, measure, print, write ``benchmarks/results/block_verification.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/block_verification.json")
    options = parser.parse_args()
    if not can_run():
        return 2
    compared = compare()
    timed = [measure(vocab, certain, options.runs) for vocab in VOCABULARIES for certain in (False, True)]
    for cell in timed:
        for how in ("launched_us", "replayed_us"):
            figures = ", ".join(
                f"{arm} {x['median']:.0f} [{x['low']:.0f}, {x['high']:.0f}]" for arm, x in cell[how].items()
            )
            drafts = "certain drafts" if cell["certain"] else "drawn drafts"
            print(f"{cell['vocabulary']:,} tokens, {drafts}, {how.partition('_')[0]}: {figures} µs")
    measured = {"batch": BATCH, "drafts": DRAFTED, "runs": options.runs, "compared": compared, "timed": timed}
    write(options.output, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
