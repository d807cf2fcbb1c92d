"""How long the ``goodput`` policy thinks, by number of requests: planning a step, and learning from one.

Half of the requests are predictable; and beside them the same where no draft ever comes true, so that almost none are
made.

.venv/bin/python benchmarks/policy_overhead.py

Both happen while the model runs (``DraftBudgetManager.on_model_executing``); only when a new request appears does the
scheduler wait for a plan. One core, no engine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import write

from vllm_instant import RequestState, StepOutcome, UpcomingStep
from vllm_instant.tools.measure.statistics import median_interval
from vllm_instant_plugins.goodput.policy import GoodputPolicy

MAX_DRAFT_TOKENS = 8
BLOCK = 12
HALF_PREDICTABLE = (0.8, 0.2), 2e-5, 64
HOPELESS = (0.0, 0.0), 2e-4, 0
"""Chances of drafts to come true, of every other request; seconds of each row beyond so many free ones."""


def run(count: int, steps: int, workload: tuple[tuple[float, float], float, int]) -> dict[str, Any]:
    """Microseconds of both calls with ``count`` requests, see ``HALF_PREDICTABLE``.

    A step's figure is a mean of ``BLOCK`` neighbouring steps, because those without drafts rest on an earlier one's.
    """
    policy = GoodputPolicy(MAX_DRAFT_TOKENS, count)
    chances, row_seconds, free_rows = workload
    states = [RequestState(f"r{i}", 100, 10_000, i % 2 * 1.0, index=i) for i in range(count)]
    for state in states:
        policy.enter(state)
    random = np.random.default_rng(0)
    lengths = [0] * count
    planning, learning = [], []
    for number in range(1, steps + 1):
        # The scheduler makes a new list of the same requests for each step.
        upcoming = UpcomingStep(list(states), MAX_DRAFT_TOKENS, number=number)
        began = time.perf_counter()
        planned = policy.get_num_draft_tokens(upcoming)
        planning.append(time.perf_counter() - began)
        accepted = [min(k, int(random.geometric(1 - chances[i % 2])) - 1) for i, k in enumerate(lengths)]
        rows = count + sum(lengths)
        seconds = 0.006 + row_seconds * max(0, rows - free_rows)
        outcome = StepOutcome(list(states), lengths, accepted, rows, seconds, count, number, max(lengths))
        began = time.perf_counter()
        policy.observe(outcome)
        learning.append(time.perf_counter() - began)
        lengths = list(planned)
    counted = slice(steps // 3, None)
    return {
        "planning_us": vars(median_interval(_blocks(planning[counted]))),
        "learning_us": vars(median_interval(_blocks(learning[counted]))),
        "granted_at_the_end": sum(lengths),
    }


def _blocks(seconds: Sequence[float]) -> list[float]:
    """Means of neighbouring steps, in microseconds."""
    starts = range(0, len(seconds) - BLOCK + 1, BLOCK)
    return [1e6 * statistics.fmean(seconds[start : start + BLOCK]) for start in starts]


def main() -> None:
    """Measure, print, write ``benchmarks/results/policy_overhead.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/policy_overhead.json")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    measured = []
    for count in (1, 4, 16, 64, 256):
        drafting, off = run(count, options.steps, HALF_PREDICTABLE), run(count, options.steps, HOPELESS)
        measured.append({"requests": count, **drafting, "hopeless_drafts": off})
        print(
            f"{count:4} requests: planning {drafting['planning_us']['median']:.0f} µs, "
            f"learning {drafting['learning_us']['median']:.0f} µs; where drafts are hopeless "
            f"{off['planning_us']['median']:.0f} and {off['learning_us']['median']:.0f} µs"
        )
    write(options.output, measured)


if __name__ == "__main__":
    main()
