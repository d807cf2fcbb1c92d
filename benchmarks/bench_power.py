"""What the rule of `vllm-instant bench` finds, and how often it cries wolf: simulated rounds of three servers.

    .venv/bin/python benchmarks/bench_power.py [--runs 300]

Two servers are stock. Processes have luck for life, the machine drifts, turns are noisy; the server that is measured is
faster by a planted difference, or by nothing. No server runs; it takes about a minute.
"""

from __future__ import annotations

import argparse

import numpy as np
from results import HERE, write
from rich.console import Console

from vllm_instant.tools.measure.significance import margin_for, ratio_contrast, resample_rounds

PROCESS, ROW, ROUND, DRIFT = 0.025, 0.01, 0.025, 0.05
"""Standard deviations: what a process is faster or slower by for life, and by row; noise of a turn; steps of drift.

About what ``benchmarks/results/bench_demo.json`` shows of its two stock servers.
"""
COMPARISONS = 25
"""Rows that get a verdict in a run, of which some are simulated."""
FALSE_ALARMS = [(0.0, 1, 6, 6), (0.0, 2, 6, 6)]
POWER = [
    (0.3, 1, 6, 1),
    (0.3, 2, 6, 1),
    (-0.3, 2, 6, 1),
    (0.1, 2, 6, 1),
    (0.1, 3, 9, 1),
    (-0.1, 3, 9, 1),
    (0.1, 4, 12, 1),
]


def simulated_verdicts(
    effect: float, *, starts: int, rounds: int, seed: int, rows: int = 1, hit: float = 0.0
) -> list[str]:
    """The verdicts of one run's rows; the arm that is measured is faster by ``effect`` in all of them.

    ``hit`` is added to the luck of its first process.
    """
    generator = np.random.default_rng(seed)
    luck = np.repeat(generator.normal(0, PROCESS, (starts, 3)), rounds // starts, axis=0)
    luck[: rounds // starts, 2] += hit
    drift = np.cumsum(generator.normal(0, DRIFT, rounds))
    found = []
    for _ in range(rows):
        own = np.repeat(generator.normal(0, ROW, (starts, 3)), rounds // starts, axis=0)
        speeds = luck + own + drift[:, None] + generator.normal(0, ROUND, (rounds, 3))
        speeds[:, 2] += np.log1p(effect)
        arms = [
            resample_rounds([np.array([[800.0, 800.0 / s]]) for s in np.exp(speeds[:, arm])], _rate, draws=250)
            for arm in range(3)
        ]
        contrast = ratio_contrast(
            arms[2], arms[0], arms[1], better="higher", margin=margin_for(starts), comparisons=COMPARISONS
        )
        found.append(contrast.verdict if contrast is not None else "")
    return found


def main() -> None:
    """Simulate, print, write ``benchmarks/results/bench_power.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    options = parser.parse_args()
    console = Console()
    cells = []
    for effect, starts, rounds, rows in [*FALSE_ALARMS, *POWER]:
        runs = [
            simulated_verdicts(effect, starts=starts, rounds=rounds, seed=seed, rows=rows)
            for seed in range(options.runs)
        ]
        said = sum(set(run) != {"no difference"} for run in runs)
        right = "better" if effect > 0 else "worse"
        cells.append(
            {
                "planted_difference": effect,
                "starts": starts,
                "rounds": rounds,
                "rows": rows,
                "runs": options.runs,
                "runs_with_a_verdict": said,
                "runs_with_the_right_verdict": sum(set(run) == {right} for run in runs) if effect else None,
            }
        )
        console.print(cells[-1], highlight=False)
    spreads = {"process": PROCESS, "process_by_row": ROW, "turn": ROUND, "drift_step": DRIFT}
    write(HERE / "results/bench_power.json", {"standard_deviations": spreads, "cells": cells})


def _rate(sums: np.ndarray) -> float:
    return float(sums[:, 0].sum() / sums[:, 1].sum())


if __name__ == "__main__":
    main()
