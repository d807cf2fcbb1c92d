"""Bootstrap intervals (percentile method, Efron 1979) of medians, of ratios of paired rounds and of sums.

They are ``scipy.stats.bootstrap``'s. ``significance.resample_rounds`` resamples rounds itself: a round's samples have
another number in each round, and all arms must draw the same rounds, both of which scipy cannot express.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap


@dataclass(frozen=True)
class Interval:
    """A median and the bounds of its bootstrap confidence interval."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Estimate:
    """A mean or a function of sums, with the bounds of its bootstrap confidence interval."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def median_interval(values: Sequence[float], confidence: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """Interval of the median; raises ValueError without values."""
    if len(values) == 0:
        raise ValueError("no values")
    data = np.asarray(values, dtype=float)
    median = float(np.median(data))
    if len(data) == 1:
        return Interval(median, median, median)
    found = bootstrap(
        (data,),
        np.median,
        n_resamples=draws,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(median, float(found.low), float(found.high))


def ratio_interval(
    ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Interval of the median of ``ours[i] / theirs[i]``, the two arms of each round.

    Rounds are resampled as pairs, so that drift of the machine between rounds cancels.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rounds of one arm, {len(theirs)} of the other")
    return median_interval([a / b for a, b in zip(ours, theirs, strict=True)], confidence, draws, seed)


def estimate(
    rows: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    confidence: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> Estimate:
    """Interval of a statistic of column sums, with rows resampled.

    Args:
        rows: ``[samples, columns]``.
        statistic: from sums ``[draws, columns]`` to values ``[draws]``.
        confidence: of the interval.
        draws: number of resamples.
        seed: of the resamples.

    """
    value = float(statistic(rows.sum(0)[None, :])[0])
    if len(rows) == 1:
        return Estimate(value, value, value)

    def of_columns(*columns: np.ndarray, axis: int = -1) -> np.ndarray:
        sums = np.stack([column.sum(axis) for column in columns], axis=-1)
        return statistic(sums.reshape(-1, len(columns))).reshape(sums.shape[:-1])

    found = bootstrap(
        tuple(np.asarray(column, float) for column in rows.T),
        of_columns,
        n_resamples=draws,
        batch=1000,
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))
