"""Rounds of three servers, two of them stock, with the luck of processes, the machine's drift and noise, as sums."""

from __future__ import annotations

import numpy as np

from vllm_instant.evidence.verdicts import margin_for, ratio, resampled

PROCESS, ROW, ROUND, DRIFT = 0.025, 0.01, 0.025, 0.05
"""Standard deviations: what a process is faster or slower by for life, and by row; noise of a turn; steps of drift.

About what `benchmarks/results/bench_demo.json` shows of its two stock servers."""


def simulated_verdicts(effect, *, starts, rounds, seed, rows=8, hit=0.0):
    """The verdicts of one run's rows; the arm that is measured is faster by ``effect`` in all of them.

    ``hit`` is added to the luck of its first process.
    """
    generator = np.random.default_rng(seed)
    luck = np.repeat(generator.normal(0, PROCESS, (starts, 3)), rounds // starts, axis=0)
    luck[: rounds // starts, 2] += hit
    drift = np.cumsum(generator.normal(0, DRIFT, rounds))
    found = []
    for _row in range(rows):
        own = np.repeat(generator.normal(0, ROW, (starts, 3)), rounds // starts, axis=0)
        speeds = luck + own + drift[:, None] + generator.normal(0, ROUND, (rounds, 3))
        speeds[:, 2] += np.log1p(effect)
        arms = [
            resampled([np.array([[800.0, 800.0 / s]]) for s in np.exp(speeds[:, arm])], _rate, draws=250)
            for arm in range(3)
        ]
        contrast = ratio(arms[2], arms[0], arms[1], better="higher", margin=margin_for(starts), comparisons=25)
        found.append(contrast.verdict)
    return found


def _rate(sums):
    return sums[:, 0].sum() / sums[:, 1].sum()
