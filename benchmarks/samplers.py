"""The rejection samplers: how long verification takes in a step, and how many of the same drafts they accept.

    .venv/bin/python benchmarks/samplers.py time [--rounds 25]
    .venv/bin/python benchmarks/samplers.py acceptance [--places 3000]

``time``: batch 16 with 8 draft tokens each, temperature 1, drafts sampled from a distribution like a fair draft
model's, on the CPU. Everything that vLLM's model runner calls is timed: copies of logits, temperature, top-p if asked
for, the verification and the token after it. The samplers take turns; ratios are of neighbouring calls.

``acceptance``: at many places of held-out text the demo's draft model samples eight tokens (temperature 1, float32),
and the target verifies them. For each draft and each length the expected number of accepted tokens under ``token`` and
under ``block`` is computed exactly, from the probabilities that the samplers themselves use, so that the only noise is
which drafts were sampled. Intervals are bootstraps over places. Nothing is timed, and there is no engine.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import HERE, write
from sampler_harness import drafts_metadata, our_sampler, prepare_cpu_kernels, sampling_metadata, stock_sampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_instant.speculation.verification import pad_drafts
from vllm_instant.tools.demo import assets, widen_model
from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval
from vllm_instant_plugins.samplers import block
from vllm_instant_plugins.samplers.block import BlockSampler
from vllm_instant_plugins.samplers.relaxed import RelaxedSampler
from vllm_instant_plugins.samplers.token import TokenSampler, ratios

BATCH, LENGTH = 16, 8
LENGTHS = range(2, 9)
CONTEXT = 96


def seconds_of(samplers: dict[str, Any], vocabulary: int, top_p: float | None, certain: bool, rounds: int) -> Any:
    """Seconds of each call by sampler, in turns, each round with drafts of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    sampling = sampling_metadata([1.0] * BATCH, None if top_p is None else [top_p] * BATCH)
    for number in range(rounds + 2):
        torch.manual_seed(number)
        logits = 3 * torch.randn(BATCH * (LENGTH + 1), vocabulary)
        metadata = drafts_metadata([[0] * LENGTH] * BATCH)
        rows = logits[metadata.target_logits_indices]
        probs = (rows + torch.randn(rows.shape)).softmax(-1)
        metadata.draft_token_ids = torch.multinomial(probs, 1)[:, 0].to(torch.int32)
        for name, sampler in samplers.items():
            began = time.perf_counter()
            sampler(metadata, None if certain else probs, logits, sampling)
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def kept_of(target_probs: torch.Tensor, draft_probs: torch.Tensor, drafts: torch.Tensor) -> tuple[Any, Any]:
    """Expected accepted tokens of each draft under ``token`` and under ``block``; float64 ``[batch]`` each.

    Args:
        target_probs: float32 ``[batch, length, vocabulary]``.
        draft_probs: the same of the draft model.
        drafts: int64 ``[batch, length]``.

    """
    batch, length = drafts.shape
    rows = pad_drafts(drafts.flatten(), [length] * batch)
    target, draft = target_probs.flatten(0, 1).contiguous(), draft_probs.flatten(0, 1).contiguous()
    of_drafts = ratios(rows, target, draft)
    by_token = of_drafts.clamp(max=1).cumprod(1).sum(1)
    probabilities = block.length_chances(rows, block.weights(of_drafts), target, draft)
    # A length is reached when it or a longer one is acceptable.
    reached = 1 - (1 - probabilities).flip(1).cumprod(1).flip(1)
    return by_token, reached.sum(1)


def places(tokenizer: Any, kind: str, count: int) -> torch.Tensor:
    """int64 ``[count, CONTEXT]``: evenly spread over the held-out documents of a kind."""
    text = "\n".join(document.text for document in documents() if document.held_out and document.kind == kind)
    stream = torch.tensor(tokenizer(text)["input_ids"])
    starts = torch.linspace(0, len(stream) - CONTEXT - 1, count).long()
    return torch.stack([stream[start : start + CONTEXT] for start in starts])


def drafted(target: Any, draft: Any, tokens: torch.Tensor, length: int, temperature: float) -> tuple[Any, Any, Any]:
    """Both models' probabilities ``[batch, length, vocabulary]`` and the drafts ``[batch, length]``."""
    draft_probs = []
    with torch.inference_mode():
        for _ in range(length):
            draft_probs.append((draft(input_ids=tokens).logits[:, -1].float() / temperature).softmax(-1))
            tokens = torch.cat([tokens, torch.multinomial(draft_probs[-1], 1)], 1)
        target_probs = (target(input_ids=tokens).logits[:, CONTEXT - 1 : -1].float() / temperature).softmax(-1)
    return target_probs, torch.stack(draft_probs, 1), tokens[:, CONTEXT:]


def timed(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of whole calls by vocabulary, kind of drafts and sampler."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    prepare_cpu_kernels()
    samplers = {
        "vllm": stock_sampler(),
        "token": our_sampler(TokenSampler()),
        "block": our_sampler(BlockSampler()),
        "relaxed": our_sampler(RelaxedSampler(0.1)),
    }
    cells = []
    for vocabulary in (32_000, 150_000):
        for top_p, certain in ((None, False), (None, True), (0.95, False)):
            seconds = seconds_of(samplers, vocabulary, top_p, certain, rounds)
            for name, values in seconds.items():
                cell = {
                    "vocabulary": vocabulary,
                    "drafts": "certain" if certain else "sampled",
                    "top_p": top_p,
                    "sampler": name,
                    "milliseconds": vars(median_interval([1e3 * value for value in values])),
                    "of_vllm": vars(ratio_interval(values, seconds["vllm"])),
                }
                cells.append(cell)
                case = f"{vocabulary:7} {cell['drafts']:8} top_p {top_p}: {name:8}"
                times = f"{cell['milliseconds']['median']:7.1f} ms, {cell['of_vllm']['median']:.2f} of vLLM's"
                print(case, times, flush=True)
    return cells


def accepted(count: int, temperature: float = 1.0) -> list[dict[str, Any]]:
    """Expected accepted tokens of both rules by class of text and draft length."""
    torch.manual_seed(0)
    pair = assets.prepare(size=widen_model.SMALL, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    target, draft = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (pair.target, pair.draft)
    )
    cells = []
    for kind in ("structured", "code"):
        both: dict[int, list[tuple[Any, Any]]] = {length: [] for length in LENGTHS}
        for group in places(tokenizer, kind, count).split(25):
            target_probs, draft_probs, drafts = drafted(target, draft, group, max(LENGTHS), temperature)
            for length in LENGTHS:
                both[length].append(kept_of(target_probs[:, :length], draft_probs[:, :length], drafts[:, :length]))
        for length, parts in both.items():
            token, blocks = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
            picks = np.random.default_rng(0).integers(0, len(token), (4000, len(token)))
            low, high = np.quantile(blocks[picks].mean(1) / token[picks].mean(1), [0.025, 0.975])
            cells.append(
                {
                    "text": kind,
                    "draft_length": length,
                    "temperature": temperature,
                    "drafts": len(token),
                    "kept_by_token": token.mean(),
                    "kept_by_block": blocks.mean(),
                    "gain": {"mean": blocks.mean() / token.mean(), "low": low, "high": high},
                    "tokens_per_step_gain": (1 + blocks.mean()) / (1 + token.mean()),
                }
            )
            print(
                f"{kind:10} length {length}: {token.mean():.3f} -> {blocks.mean():.3f} accepted, "
                f"gain {blocks.mean() / token.mean():.3f} [{low:.3f}, {high:.3f}]",
                flush=True,
            )
    return cells


def main() -> None:
    """Measure one part, print, write ``benchmarks/results/samplers.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("time", "acceptance"))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--places", type=int, default=1500, help="drafts of each class of text")
    parser.add_argument("--output", type=Path, default=HERE / "results/samplers.json")
    options = parser.parse_args()
    cells = timed(options.rounds) if options.part == "time" else accepted(options.places)
    write(options.output, cells, options.part)


if __name__ == "__main__":
    main()
