"""One spike with everything that attribution reads: metrics and requests of the spike and of the baseline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_instant_loadtests.metric_series import MetricSeries, TimeSpan
from vllm_instant_loadtests.run_recorder import RecordedRequest, RecordedRun
from vllm_instant_loadtests.spikes import MetricRise
from vllm_instant_loadtests.windows import ITL, PACE, STALL, TTFT, LatencySamples

AROUND = 0.6
"""Seconds before and after a spike whose metric readings belong to it, since they are half a second apart."""
LATE = 0.1
"""Minimum delay of a load generator's timer that counts, seconds."""


@dataclass(frozen=True)
class SpikeContext:
    """One spike of one server, in its run."""

    run: RecordedRun
    """The part of the run that concerns this server."""
    metrics: MetricSeries
    measured: dict[str, LatencySamples]
    """By metric, see ``windows.latency_samples``."""
    rises: Sequence[MetricRise]
    quiet: Sequence[TimeSpan]
    """The baseline: parts of the run without spikes."""

    @cached_property
    def span(self) -> TimeSpan:
        """Begin and end of the spike."""
        return min(rise.began for rise in self.rises), max(rise.ended for rise in self.rises)

    @cached_property
    def wide(self) -> TimeSpan:
        """The spike with the readings around it."""
        return self.span[0] - AROUND, self.span[1] + AROUND

    @property
    def seconds(self) -> float:
        """Length of the spike."""
        return self.span[1] - self.span[0]

    def ratio(self, *metrics: str) -> float:
        """The largest rise among these metrics, as a factor; 1 where none rose."""
        return max((rise.ratio.mean for rise in self.rises if rise.metric in metrics), default=1.0)

    @cached_property
    def delay(self) -> float:
        """Seconds of delay in the spike, by its worst metric."""
        return max(rise.delay for rise in self.rises)

    @cached_property
    def slowdown(self) -> float:
        """The rise of the time between tokens, as a factor of at least 1."""
        return max(self.ratio(ITL, PACE), 1.0)

    @cached_property
    def pace_ratio(self) -> float:
        """Mean time between tokens divided by the baseline's, significant or not."""
        between = self.measured[PACE]
        quiet = LatencySamples.joined([between.within(*span) for span in self.quiet])
        return between.within(*self.span).mean() / quiet.mean()

    @cached_property
    def usual_wait(self) -> float:
        """The baseline's 99th percentile of the time between two arrivals, seconds."""
        gaps = self.measured[STALL]
        inside = [gaps.within(*span) for span in self.quiet]
        values = np.concatenate([part.values for part in inside] or [np.empty(0)])
        return float(np.quantile(values, 0.99)) if len(values) else float("nan")

    @cached_property
    def max_token_wait(self) -> float:
        """The longest time between two arrivals of one answer in the spike, seconds."""
        inside = self.measured[STALL].within(*self.span)
        return float(inside.values.max()) if len(inside.values) else 0.0

    @cached_property
    def max_standstill(self) -> TimeSpan:
        """The longest time in the spike in which answers were in progress and none received a token."""
        times = np.sort([when for request in self.run.requests for when, _ in request.arrivals])
        best = (self.span[0], self.span[0])
        for before, after in itertools.pairwise(map(float, times)):
            if after <= self.span[0] or before >= self.span[1] or after - before <= best[1] - best[0]:
                continue
            if any(r.due < (before + after) / 2 < r.ended for r in self.run.requests):
                best = (before, after)
        return best

    @cached_property
    def first_token(self) -> tuple[float, float]:
        """Longest time to a first token in the spike, and the baseline's 99th percentile, seconds."""
        first = self.measured[TTFT]
        inside = first.within(*self.span)
        quiet = np.concatenate([first.within(*span).values for span in self.quiet] or [np.empty(0)])
        worst = float(inside.values.max()) if len(inside.values) else 0.0
        return worst, float(np.quantile(quiet, 0.99)) if len(quiet) else float("nan")

    def sent(self, span: TimeSpan) -> list[RecordedRequest]:
        """Requests that were due in a part of the run."""
        return [request for request in self.run.requests if span[0] <= request.due < span[1]]

    def sent_before(self) -> list[RecordedRequest]:
        """Requests of the baseline."""
        return [r for r in self.run.requests if any(begin <= r.due < end for begin, end in self.quiet)]

    def late(self) -> float:
        """Delay of the load generator, seconds: the maximum, or the sum where the spike is one of pace.

        A slow request or a stall is a single event; the delays of an answer that falls behind add up.
        """
        began, ended = self.span
        late = [c.late for c in self.run.client if c.at - c.late <= ended and c.at >= began and c.late >= LATE]
        worst = max(self.rises, key=lambda rise: rise.delay)
        return max(late, default=0.0) if worst.metric in (TTFT, STALL) else float(sum(late))


def reached(request: RecordedRequest) -> float:
    """When a request's prefill had ended: its first token, or its end without one."""
    return request.arrivals[0][0] if request.arrivals else request.ended


def explained(factor: float, rise: float) -> float:
    """Share of a rise (a factor) that another factor explains: the ratio of their logarithms, within 0 and 1."""
    if not factor > 1 or not math.isfinite(factor):
        return 0.0
    return min(1.0, math.log(factor) / math.log(max(rise, 1.05)))
