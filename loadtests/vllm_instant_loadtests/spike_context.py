"""Everything around one spike that attribution looks at: the spike, the baseline, and what was seen of both."""

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
"""Seconds before and after a spike whose readings belong to it: they are half a second apart."""
LATE = 0.1
"""Seconds from which on a late timer of the load generator counts."""


@dataclass(frozen=True)
class SpikeContext:
    """One spike of one server, in its run."""

    run: RecordedRun
    """Of this server alone."""
    meters: MetricSeries
    measured: dict[str, LatencySamples]
    """By metric, see ``windows.entries``."""
    rises: Sequence[MetricRise]
    quiet: Sequence[TimeSpan]
    """The baseline: parts of the run without spikes."""

    @cached_property
    def span(self) -> TimeSpan:
        """When the spike was."""
        return min(rise.began for rise in self.rises), max(rise.ended for rise in self.rises)

    @cached_property
    def wide(self) -> TimeSpan:
        """With the readings around it."""
        return self.span[0] - AROUND, self.span[1] + AROUND

    @property
    def seconds(self) -> float:
        """Length of the spike."""
        return self.span[1] - self.span[0]

    def ratio(self, *metrics: str) -> float:
        """By what factor the worst of these metrics rose; 1 where none did."""
        return max((rise.ratio.mean for rise in self.rises if rise.metric in metrics), default=1.0)

    @cached_property
    def lost(self) -> float:
        """Seconds of delay that the spike brought, by its worst metric."""
        return max(rise.lost for rise in self.rises)

    @cached_property
    def slower(self) -> float:
        """By what factor tokens came slower."""
        return max(self.ratio(ITL, PACE), 1.0)

    @cached_property
    def paced(self) -> float:
        """By what factor the mean time between tokens differed from the baseline's, certain or not."""
        between = self.measured[PACE]
        quiet = LatencySamples.joined([between.within(*span) for span in self.quiet])
        return between.within(*self.span).mean() / quiet.mean()

    @cached_property
    def gap(self) -> float:
        """A usual long wait between two arrivals: the baseline's 99th percentile, seconds."""
        gaps = self.measured[STALL]
        inside = [gaps.within(*span) for span in self.quiet]
        values = np.concatenate([part.values for part in inside] or [np.empty(0)])
        return float(np.quantile(values, 0.99)) if len(values) else float("nan")

    @cached_property
    def longest(self) -> float:
        """The longest wait between two arrivals of one answer in the spike, seconds."""
        inside = self.measured[STALL].within(*self.span)
        return float(inside.values.max()) if len(inside.values) else 0.0

    @cached_property
    def silence(self) -> TimeSpan:
        """The longest time in the spike in which answers were under way, but nobody got anything."""
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
        """Requests that came in a part of the run."""
        return [request for request in self.run.requests if span[0] <= request.due < span[1]]

    def sent_before(self) -> list[RecordedRequest]:
        """Requests of the baseline."""
        return [r for r in self.run.requests if any(begin <= r.due < end for begin, end in self.quiet)]

    def late(self) -> float:
        """By how much the load generator was late, seconds: at worst, or in sum where the spike is one of pace.

        A worst request or stall is one moment; answers that fall behind fall behind again and again.
        """
        began, ended = self.span
        late = [c.late for c in self.run.client if c.at - c.late <= ended and c.at >= began and c.late >= LATE]
        worst = max(self.rises, key=lambda rise: rise.lost)
        return max(late, default=0.0) if worst.metric in (TTFT, STALL) else float(sum(late))


def reached(request: RecordedRequest) -> float:
    """When a request had been read: its first token, or its end without one."""
    return request.arrivals[0][0] if request.arrivals else request.ended


def explained(factor: float, rise: float) -> float:
    """Share of a rise (a factor) that another factor explains, between 0 and 1, on the scale of logarithms."""
    if not factor > 1 or not math.isfinite(factor):
        return 0.0
    return min(1.0, math.log(factor) / math.log(max(rise, 1.05)))
