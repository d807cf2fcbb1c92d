"""Requests as time series: latency metrics in windows of a run.

Windows overlap by half. A gap between two arrivals belongs to all windows that it overlaps, so that a window in which
nothing arrived still shows the wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant_loadtests.run_recorder import RecordedRequest

Array = npt.NDArray[np.float64]
ITL, PACE, TTFT, STALL = "itl", "pace", "ttft", "stall"
METRICS = (ITL, PACE, TTFT, STALL)
"""p99 time between tokens; mean time between tokens; p99 time to first token; longest time between two arrivals."""
HOP = 0.5
"""Seconds from one window to the next."""
WIDTH = {ITL: 1.0, PACE: 1.0, TTFT: 2.0, STALL: 1.0}
WARM_UP = 2.0
"""Seconds at the beginning of a segment that are ignored, while the load builds up."""
MIN_SECONDS = 15.0
"""Minimum duration of windows with data; less is no baseline."""
MIN_ENTRIES = {ITL: 300, PACE: 300, TTFT: 15, STALL: 300}
"""Minimum number of tokens (TTFT: of first tokens) in a run."""
FIELDS = ("began", "ended", "values", "weights", "owner")


@dataclass(frozen=True)
class LatencySamples:
    """Measured durations, each with its time span, weight and request."""

    began: Array
    """``[n]``, seconds of the run."""
    ended: Array
    values: Array
    """Seconds."""
    weights: Array
    """Tokens."""
    owner: Array
    """Number of the request that each belongs to."""

    def within(self, began: float, ended: float) -> LatencySamples:
        """The samples that overlap a part of the run."""
        return self.chosen((self.ended > began) & (self.began < ended))

    @classmethod
    def joined(cls, parts: Sequence[LatencySamples]) -> LatencySamples:
        """The concatenation of several."""
        return cls(*(np.concatenate([np.empty(0), *(getattr(part, name) for part in parts)]) for name in FIELDS))

    @classmethod
    def plain(cls, values: Array) -> LatencySamples:
        """Values without times, of weight 1."""
        return cls(values, values, values, np.ones(len(values)), np.arange(len(values), dtype=float))

    def chosen(self, which: npt.NDArray[Any]) -> LatencySamples:
        """The samples that a mask or an index selects."""
        return LatencySamples(*(getattr(self, name)[which] for name in FIELDS))

    def quantile(self, share: float) -> float:
        """Weighted; NaN without samples."""
        if not len(self.values):
            return float("nan")
        order = np.argsort(self.values)
        cumulated = np.cumsum(self.weights[order])
        return float(self.values[order][np.searchsorted(cumulated, share * cumulated[-1])])

    def mean(self) -> float:
        """Weighted; NaN without samples."""
        return float(np.average(self.values, weights=self.weights)) if len(self.values) else float("nan")


@dataclass(frozen=True)
class WindowedSeries:
    """One metric over time."""

    metric: str
    at: Array
    """``[windows]``: the middles, seconds of the run."""
    values: Array
    """``[windows]``: seconds; NaN where there is nothing to measure."""
    segment: npt.NDArray[np.int64]
    """``[windows]``: number of the segment of each; windows of two segments are not neighbours."""
    too_little: str = ""
    """Why there is too little data for the metric; empty if there is enough."""

    @property
    def half(self) -> float:
        """Half a window, seconds."""
        return WIDTH[self.metric] / 2


def statistic(metric: str, samples: LatencySamples) -> float:
    """The value of a metric for some samples."""
    if metric == PACE:
        return samples.mean()
    if metric == STALL:
        return float(samples.values.max()) if len(samples.values) else float("nan")
    return samples.quantile(0.99)


def latency_samples(requests: Iterable[RecordedRequest]) -> dict[str, LatencySamples]:
    """The latency samples of all requests, by metric.

    ``itl`` and ``pace``: one sample per arrival after the first, its time per token, weighted with its tokens.
    ``stall``: the same gaps undivided, and for a failed answer the time from its last token to its end. ``ttft``: from
    when a request was due to its first token, or to its end without one.
    """
    gaps: list[tuple[float, float, int, int]] = []
    cut: list[tuple[float, float, int, int]] = []
    first: list[tuple[float, float, int]] = []
    for number, request in enumerate(requests):
        if request.arrivals:
            first.append((request.due, request.arrivals[0][0], number))
            for (before, had), (when, have) in zip(request.arrivals, request.arrivals[1:], strict=False):
                gaps.append((before, when, have - had, number))
            if request.error:
                cut.append((request.arrivals[-1][0], request.ended, 1, number))
        elif not request.left:
            first.append((request.due, request.ended, number))
    between = np.array(gaps, float).reshape(-1, 4)
    waits = np.concatenate([between, np.array(cut, float).reshape(-1, 4)])
    starts = np.array(first, float).reshape(-1, 3)
    tokens = np.maximum(between[:, 2], 1)
    by_token = LatencySamples(
        between[:, 0], between[:, 1], (between[:, 1] - between[:, 0]) / tokens, tokens, between[:, 3]
    )
    return {
        ITL: by_token,
        PACE: by_token,
        STALL: LatencySamples(waits[:, 0], waits[:, 1], waits[:, 1] - waits[:, 0], np.ones(len(waits)), waits[:, 3]),
        TTFT: LatencySamples(
            starts[:, 0], starts[:, 0] + 1e-6, starts[:, 1] - starts[:, 0], np.ones(len(starts)), starts[:, 2]
        ),
    }


def loaded_segments(
    segments: Sequence[Mapping[str, Any]], server: str, requests: Sequence[RecordedRequest]
) -> list[tuple[float, float]]:
    """``(began, ended)`` of the segments in which a server had load; the whole run where it lists no segments.

    A segment ends with its last due request: after that, the load only drains.
    """
    asked = [(float(s["began"]), float(s["ended"]), s.get("number")) for s in segments if s["server"] == server]
    if not requests:
        return []
    last = max(request.due for request in requests)
    if not asked:
        return [(min(request.due for request in requests), last)]
    found = []
    for began, ended, number in asked:
        dues = [r.due for r in requests if (r.segment == number if r.segment is not None else began <= r.due < ended)]
        if dues:
            found.append((began, min(ended, max(dues))))
    return found


def windowed_series(metric: str, measured: LatencySamples, parts: Sequence[tuple[float, float]]) -> WindowedSeries:
    """A metric in windows of every segment."""
    middles, segment = [], []
    for number, (began, ended) in enumerate(parts):
        inside = np.arange(began + WARM_UP + WIDTH[metric] / 2, ended - WIDTH[metric] / 2 + 1e-9, HOP)
        middles.append(inside)
        segment.append(np.full(len(inside), number))
    at: Array = np.concatenate([*middles, np.empty(0)]).astype(np.float64)
    values = _in_windows(metric, measured, at)
    stretch = np.concatenate([*segment, np.empty(0, int)]).astype(np.int64)
    return WindowedSeries(metric, at, values, stretch, _too_little(metric, measured, values))


def _too_little(metric: str, measured: LatencySamples, values: Array) -> str:
    seconds, tokens = float(np.isfinite(values).sum() * HOP), measured.weights.sum()
    if seconds < MIN_SECONDS:
        return f"{seconds:.0f} s with {metric} data, {MIN_SECONDS:.0f} are needed for a baseline"
    if tokens < MIN_ENTRIES[metric]:
        what = "first tokens" if metric == TTFT else "tokens"
        return f"{tokens:.0f} {what}, {MIN_ENTRIES[metric]} are needed for a baseline"
    return ""


def _in_windows(metric: str, measured: LatencySamples, at: Array) -> Array:
    values = np.full(len(at), np.nan)
    if not len(measured.values):
        return values
    # Sorted by their ends, all samples that overlap a window lie between two indices; gaps that are still open at the
    # window's end come later in that order, hence the running minimum of the begins.
    order = np.argsort(measured.ended, kind="stable")
    ordered = measured.chosen(order)
    latest = np.minimum.accumulate(ordered.began[::-1])[::-1]
    half = WIDTH[metric] / 2
    first = np.searchsorted(ordered.ended, at - half, side="right")
    # From this index on, all samples begin after the window.
    last = np.searchsorted(latest, at + half, side="left")
    for i, (low, high) in enumerate(zip(first, last, strict=True)):
        if high > low:
            part = ordered.chosen(slice(low, high))  # type: ignore[arg-type]
            touching = part.chosen(part.began < at[i] + half)
            values[i] = statistic(metric, touching)
    return values
