"""Simulated runs of `vllm-instant bench`: two baseline servers and one with a known difference, with measured noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_instant.tools.measure.significance import Contrast, margin_for, ratio_contrast, resample_rounds

PROCESS, ROW, ROUND, DRIFT = 0.025, 0.01, 0.025, 0.05
"""Standard deviations of log speed: of processes, of processes in one row, of rounds, of a step of drift.

They are close to those of the two baseline servers in ``benchmarks/results/bench_demo.json``.
"""
COMPARISONS = 25
"""Rows of a run that get a verdict; only some of them are simulated."""


def simulated_verdicts(effect: float, **given: Any) -> list[str]:
    """The verdicts of one run's rows, see ``simulated_contrasts``."""
    return [contrast.verdict for contrast in simulated_contrasts(effect, **given)]


def simulated_contrasts(
    effect: float, *, starts: int, rounds: int, seed: int, rows: int = 1, hit: float = 0.0, looks: int = 1
) -> list[Contrast]:
    """The rows of one run; the measured arm is faster by ``effect`` in all of them.

    ``hit`` is added to the log speed of its first process; ``looks`` is how often the run looks at its data.
    """
    generator = np.random.default_rng(seed)
    per_start = -(-rounds // starts)
    process = np.repeat(generator.normal(0, PROCESS, (starts, 3)), per_start, axis=0)[:rounds]
    process[:per_start, 2] += hit
    drift = np.cumsum(generator.normal(0, DRIFT, rounds))
    found = []
    for _ in range(rows):
        by_row = np.repeat(generator.normal(0, ROW, (starts, 3)), per_start, axis=0)[:rounds]
        speeds = process + by_row + drift[:, None] + generator.normal(0, ROUND, (rounds, 3))
        speeds[:, 2] += np.log1p(effect)
        arms = [
            resample_rounds([np.array([[800.0, 800.0 / s]]) for s in np.exp(speeds[:, arm])], _rate, draws=250)
            for arm in range(3)
        ]
        contrast = ratio_contrast(
            arms[2],
            arms[0],
            arms[1],
            better="higher",
            margin=margin_for(starts),
            comparisons=COMPARISONS,
            looks=looks,
        )
        assert contrast is not None
        found.append(contrast)
    return found


def _rate(sums: np.ndarray) -> float:
    return float(sums[:, 0].sum() / sums[:, 1].sum())
