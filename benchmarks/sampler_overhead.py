"""How long verification takes in a step, by sampler and vocabulary: vLLM's rejection sampler and ours, whole calls.

.venv/bin/python benchmarks/sampler_overhead.py

Batch 16 with 8 draft tokens each, temperature 1, drafts sampled from a distribution like a fair draft model's, on the
CPU. Everything that vLLM's model runner calls is timed: copies of logits, temperature, top-p if asked for, the
verification and the token behind it. The samplers take turns; ratios are of turns next to each other.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from results import write
from sampler_harness import drafts_metadata, our_sampler, prepare_cpu_kernels, sampling_metadata, stock_sampler

from vllm_instant.tools.measure.statistics import median_interval, ratio_interval
from vllm_instant_plugins.samplers.block import BlockSampler
from vllm_instant_plugins.samplers.relaxed import RelaxedSampler
from vllm_instant_plugins.samplers.token import TokenSampler

BATCH, LENGTH = 16, 8


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


def main() -> None:
    """Measure, print, write ``benchmarks/results/sampler_overhead.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/sampler_overhead.json")
    arguments = parser.parse_args()
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
            seconds = seconds_of(samplers, vocabulary, top_p, certain, arguments.rounds)
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
    write(arguments.output, cells)


if __name__ == "__main__":
    main()
