"""Bootstrap intervals: of medians, of ratios of alternating arms, and of what is computed from sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


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
    """A mean, or what else is computed from sums, with the bounds of its bootstrap confidence interval."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def median_interval(values: Sequence[float], confidence: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """Percentile-bootstrap interval of the median (Efron 1979); raises ValueError without values."""
    if len(values) == 0:
        raise ValueError("no values")
    data = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(data), (draws, len(data)))
    return _interval(float(np.median(data)), np.median(data[picks], axis=1), confidence)


def ratio_interval(
    ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Interval of the median of ``ours[i] / theirs[i]``, the two arms of one round each.

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
    """Percentile-bootstrap interval of a statistic of the sums of columns, with rows drawn again.

    Args:
        rows: ``[samples, columns]``.
        statistic: from sums ``[draws, columns]`` to values ``[draws]``.
        confidence: of the interval.
        draws: how often rows are drawn again.
        seed: of the draws.

    """
    picks = np.random.default_rng(seed).integers(0, len(rows), (draws, len(rows)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistic(rows[picks].sum(1)), [tail, 1 - tail])
    return Estimate(float(statistic(rows.sum(0)[None, :])[0]), float(low), float(high))


def _interval(centre: float, resampled: np.ndarray, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(centre, float(low), float(high))
