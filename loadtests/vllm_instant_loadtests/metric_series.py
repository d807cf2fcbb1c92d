"""A server's metrics over time, interpolated between readings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_instant_loadtests.run_recorder import MetricsSample
from vllm_instant_loadtests.windows import Array

TimeSpan = tuple[float, float]


class MetricSeries:
    """Readings of one server.

    Args:
        samples: of one server, in any order.

    """

    def __init__(self, samples: Sequence[MetricsSample]) -> None:
        self._samples = sorted(samples, key=lambda sample: sample.at)
        self.at: Array = np.array([sample.at for sample in self._samples])
        self.took: Array = np.array([sample.took for sample in self._samples])

    def has(self, name: str) -> bool:
        """Whether the server exports a metric."""
        return any(name in sample.values for sample in self._samples)

    def values(self, name: str) -> Array:
        """Its readings, ``[samples]``; NaN where one lacks it."""
        return np.array([sample.values.get(name, np.nan) for sample in self._samples])

    def growth(self, name: str, spans: Sequence[TimeSpan]) -> float:
        """Growth of a counter in parts of the run, restarts of the counter included; NaN if unknown."""
        at, total = self._counter(name)
        if len(at) < 2:
            return float("nan")
        return float(sum(np.interp(end, at, total) - np.interp(begin, at, total) for begin, end in spans))

    def rate(self, name: str, spans: Sequence[TimeSpan]) -> float:
        """Growth per second."""
        seconds = sum(end - begin for begin, end in spans)
        return self.growth(name, spans) / seconds if seconds > 0 else float("nan")

    def ratio(self, name: str, by: str, spans: Sequence[TimeSpan]) -> float:
        """Growth of one counter divided by that of another; NaN where the other one did not grow."""
        below = self.growth(by, spans)
        return self.growth(name, spans) / below if below > 0 else float("nan")

    def gauge(self, name: str, spans: Sequence[TimeSpan], at_most: bool = False) -> float:
        """Mean (or maximum) reading in parts of the run; of a single part without readings the nearest one."""
        values = self.values(name)
        known = np.isfinite(values)
        at, values = self.at[known], values[known]
        if not len(at):
            return float("nan")
        chosen = np.zeros(len(at), bool)
        for begin, end in spans:
            inside = (at >= begin) & (at <= end)
            if not inside.any() and len(spans) == 1:
                inside[np.argmin(np.abs(at - (begin + end) / 2))] = True
            chosen |= inside
        if not chosen.any():
            return float("nan")
        return float(values[chosen].max() if at_most else values[chosen].mean())

    def unanswered(self, span: TimeSpan) -> float:
        """The longest time between two readings that overlaps a part of the run."""
        if len(self.at) < 2:
            return 0.0
        begins, ends = self.at[:-1], self.at[1:]
        touching = (ends > span[0]) & (begins < span[1])
        return float((ends - begins)[touching].max()) if touching.any() else 0.0

    def unchanged(self, name: str, span: TimeSpan) -> float:
        """The longest time in a part of the run in which a counter did not grow."""
        at, total = self._counter(name)
        longest, since = 0.0, 0
        for i in range(1, len(at)):
            if total[i] > total[since]:
                since = i
            elif at[i] > span[0] and at[since] < span[1]:
                longest = max(longest, min(at[i], span[1]) - max(at[since], span[0]))
        return longest

    def _counter(self, name: str) -> tuple[Array, Array]:
        values = self.values(name)
        known = np.isfinite(values)
        at, values = self.at[known], values[known]
        steps = np.diff(values, prepend=values[:1])
        return at, np.cumsum(np.maximum(steps, 0.0))
