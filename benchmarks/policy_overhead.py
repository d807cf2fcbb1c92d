"""How long the ``goodput`` policy thinks, by number of requests: planning a step, and learning from one.

.venv/bin/python benchmarks/policy_overhead.py

Both happen while the model runs (``SpeculationBudget.while_the_model_runs``); only when a new request appears does the
scheduler wait for a plan. One core, no engine.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from results import write

from vllm_instant import RequestState, StepOutcome, UpcomingStep
from vllm_instant.evidence.statistics import median_interval
from vllm_instant_plugins.goodput.policy import GoodputPolicy

MAX_DRAFT_TOKENS = 8


def run(count: int, steps: int) -> dict[str, Any]:
    """Microseconds of both calls with ``count`` requests, half of them predictable."""
    policy = GoodputPolicy(MAX_DRAFT_TOKENS, count)
    states = [RequestState(f"r{i}", 100, 10_000, i % 2 * 1.0, index=i) for i in range(count)]
    for state in states:
        policy.enter(state)
    random = np.random.default_rng(0)
    lengths = [0] * count
    planning, learning = [], []
    for number in range(1, steps + 1):
        began = time.perf_counter()
        planned = policy.draft_lengths(UpcomingStep(states, MAX_DRAFT_TOKENS, number=number))
        planning.append(time.perf_counter() - began)
        chances = [0.8 if i % 2 == 0 else 0.2 for i in range(count)]
        accepted = [min(k, int(random.geometric(1 - c)) - 1) for k, c in zip(lengths, chances, strict=True)]
        rows = count + sum(lengths)
        seconds = 0.006 + 2e-5 * max(0, rows - 64)
        outcome = StepOutcome(states, lengths, accepted, rows, seconds, count, number, max(lengths))
        began = time.perf_counter()
        policy.observe(outcome)
        learning.append(time.perf_counter() - began)
        lengths = list(planned)
    counted = slice(steps // 3, None)
    return {
        "requests": count,
        "planning_us": vars(median_interval([1e6 * t for t in planning[counted]])),
        "learning_us": vars(median_interval([1e6 * t for t in learning[counted]])),
        "granted_at_the_end": sum(lengths),
    }


def main() -> None:
    """Measure, print, write ``benchmarks/results/policy_overhead.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/policy_overhead.json")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    measured = [run(count, options.steps) for count in (1, 4, 16, 64, 256)]
    for row in measured:
        planning, learning = row["planning_us"], row["learning_us"]
        print(
            f"{row['requests']:4} requests: planning {planning['median']:.0f} µs, learning {learning['median']:.0f} µs"
        )  # type: ignore[index]
    write(options.output, measured)


if __name__ == "__main__":
    main()
