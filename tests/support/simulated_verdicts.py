"""Simulated runs of `vllm-instant bench`: two stock servers and one whose difference is known, with measured noise."""

from __future__ import annotations

import numpy as np

from vllm_instant.tools.measure.significance import margin_for, ratio_contrast, resample_rounds

PROCESS, ROW, ROUND, DRIFT = 0.025, 0.01, 0.025, 0.05
"""Standard deviations of log speed: between processes, between processes in one row, between turns, of a step of drift.

They are close to those of the two stock servers in ``benchmarks/results/bench_demo.json``.
"""
COMPARISONS = 25
"""Rows of a run that get a verdict; only some of them are simulated."""


def simulated_verdicts(
    effect: float, *, starts: int, rounds: int, seed: int, rows: int = 1, hit: float = 0.0
) -> list[str]:
    """The verdicts of one run's rows; the arm that is measured is faster by ``effect`` in all of them.

    ``hit`` is added to the log speed of its first process.
    """
    generator = np.random.default_rng(seed)
    process = np.repeat(generator.normal(0, PROCESS, (starts, 3)), rounds // starts, axis=0)
    process[: rounds // starts, 2] += hit
    drift = np.cumsum(generator.normal(0, DRIFT, rounds))
    found = []
    for _ in range(rows):
        by_row = np.repeat(generator.normal(0, ROW, (starts, 3)), rounds // starts, axis=0)
        speeds = process + by_row + drift[:, None] + generator.normal(0, ROUND, (rounds, 3))
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


def _rate(sums: np.ndarray) -> float:
    return float(sums[:, 0].sum() / sums[:, 1].sum())
