"""Finds windows in which latency rose, tested against the run's own baseline.

For each metric (see ``windows``):

1. *Baseline*: the level is a low quantile of the windows' logarithms, which stays a baseline even where almost half of
   the run is a spike; the noise is the spread below it.
2. *Candidates*: neighbouring windows above the baseline by more than a stated ratio and by more than the noise. Their
   *mass* is the area above the baseline (log ratio times seconds): long small rises and short large ones count alike.
3. *Test*: a cluster-based permutation test (Maris & Oostenveld 2007). Under the null hypothesis there are no spikes,
   and a run consists of blocks of its baseline in another order (windows depend on their neighbours, so blocks are
   drawn, not windows). The p-value of a candidate is the share of drawn runs whose largest mass reaches its own, which
   holds for all windows at once (max-statistic, Westfall & Young 1993). A baseline without its candidates has no tail;
   the masses of drawn runs are therefore enlarged at random (``TAIL``). Metrics are corrected for by Bonferroni.
   ``scipy.stats.permutation_test`` has neither blocks nor the largest mass of a run.
4. *Answers*: where tokens were slower, enough different answers must have been slow that their texts do not explain it
   (Student's t over answers, without the slowest): with one or two in progress, an unpredictable text looks like a
   slower server.
5. *Minimum size*: a significant rise can be small. A spike is at least ``MIN_RATIO`` times the baseline, costs
   ``MIN_DELAY`` seconds, and where tokens were slower, the interval of its ratio excludes 1: not a single slow step.

Spikes of several metrics at the same time are one spike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from vllm_instant.tools.measure.statistics import Estimate
from vllm_instant_loadtests.windows import HOP, PACE, STALL, TTFT, Array, LatencySamples, WindowedSeries, statistic

ALPHA = 0.05
"""Probability that a run without any change gets a spike."""
LEVEL = 0.35
"""Quantile of the windows that is the baseline's level."""
MAX_NOISE, MAX_NOISE_ABOVE = 0.4, 0.25
"""Limits of the noise estimate (standard deviation of logarithms), and of its part above the level."""
MIN_RATIO = 1.3
NOISES = 2.5
"""A candidate's windows lie above the baseline by this many standard deviations of its noise."""
MIN_DELAY = 0.3
"""Minimum delay of answers, seconds; one slow step of a machine is no spike."""
BLOCK_SECONDS = 4.0
MIN_ANSWERS = 4
"""Minimum number of answers in progress in a rise of pace; with fewer, their texts may explain it."""
SLICE_SECONDS = 2.0
"""Length of the parts of answers whose paces are compared."""
DRAWS = 2000
TAIL = 1.0
"""The largest mass of a drawn run is enlarged by a share that is exponential with this mean: a baseline without its
candidates has no tail of its own."""
CAP = math.log(30.0)
"""Log ratios count up to here."""
BRIDGED = 1
"""Number of windows below the threshold that do not end a candidate."""
APART = 1.0
"""Spikes of several metrics within this many seconds are one."""


@dataclass(frozen=True)
class MetricRise:
    """The rise of one metric in a part of the run."""

    metric: str
    began: float
    ended: float
    baseline: float
    """The metric's statistic (p99; ``pace``: mean; ``stall``: longest) of the baseline, seconds."""
    value: float
    """The same of the rise."""
    ratio: Estimate
    """``value / baseline`` with its 95 % interval."""
    p: float
    """p-value, corrected for all windows and metrics."""
    delay: float
    """Seconds: of the worst request or stall; for ITL and pace the delay of an answer that lasts through the rise."""


@dataclass(frozen=True)
class SpikeCandidate:
    """Neighbouring windows above the baseline."""

    first: int
    last: int
    """Index of the last window."""
    mass: float
    """Area above the baseline: log ratio times seconds."""


@dataclass(frozen=True)
class BaselineLevel:
    """A metric's level and noise, in logarithms."""

    level: float
    noise: float

    @property
    def threshold(self) -> float:
        """Minimum distance of a candidate's windows from the level."""
        return max(math.log(MIN_RATIO), NOISES * self.noise)


def baseline_level(values: Array) -> BaselineLevel:
    """Level and noise of the logarithms of windows; robust against spikes that fill less than half of a run."""
    logs = np.log(values[np.isfinite(values)])
    lowest, level, higher = np.quantile(logs, [LEVEL * 0.32, LEVEL, 1 - LEVEL])
    # In standard deviations of a Gaussian, LEVEL lies 0.39 below the middle, 1 - LEVEL as much above it, and the lowest
    # 1.22 below it. Noise is not symmetric; but what lies above may be a spike, which counts only so far.
    below, above = float(level - lowest) / 0.83, float(higher - level) / 0.77
    noise = min(MAX_NOISE, max(below, min(above, MAX_NOISE_ABOVE)))
    return BaselineLevel(float(level) + 0.39 * min(below, above, MAX_NOISE_ABOVE), noise)


def candidates(excess: Array, segment: npt.NDArray[Any], threshold: float) -> list[SpikeCandidate]:
    """Clusters of windows.

    Args:
        excess: ``[windows]``, log ratio to the baseline; NaN where nothing was measured.
        segment: ``[windows]``, segments of the run.
        threshold: minimum of a cluster's windows.

    """
    above = np.flatnonzero(np.nan_to_num(excess, nan=-1.0) > threshold)
    found: list[SpikeCandidate] = []
    for i in above:
        if found and i - found[-1].last <= 1 + BRIDGED and segment[i] == segment[found[-1].last]:
            found[-1] = SpikeCandidate(found[-1].first, int(i), 0.0)
        else:
            found.append(SpikeCandidate(int(i), int(i), 0.0))
    capped = np.clip(np.nan_to_num(excess), 0.0, CAP)
    return [SpikeCandidate(c.first, c.last, float(capped[c.first : c.last + 1].sum() * HOP)) for c in found]


def largest_masses(excess: Array, quiet: Array, threshold: float, seed: int = 0, draws: int = DRAWS) -> Array:
    """The largest mass in each of ``draws`` runs made of blocks of the baseline; ``[draws]``.

    Args:
        excess: ``[windows]``, log ratio to the baseline.
        quiet: ``[windows]``, bool: which windows are baseline.
        threshold: of candidates.
        seed: of the draws.
        draws: number of drawn runs.

    """
    pool = excess[quiet & np.isfinite(excess)]
    length = int(np.isfinite(excess).sum())
    block = max(1, min(round(BLOCK_SECONDS / HOP), len(pool) // 2))
    blocks = -(-length // block)
    random = np.random.default_rng(seed)
    starts = random.integers(0, len(pool), (draws, blocks))
    drawn = pool[(starts[:, :, None] + np.arange(block)) % len(pool)]
    one = np.zeros(length)
    masses = [
        max((c.mass for c in candidates(run[:length], one, threshold)), default=0.0) for run in drawn.reshape(draws, -1)
    ]
    return np.array(masses) * (1 + TAIL * random.exponential(1.0, draws))


def significant(
    series: WindowedSeries, metrics: int, alpha: float = ALPHA
) -> tuple[list[tuple[SpikeCandidate, float]], Array]:
    """The significant candidates with their corrected p-values, and which windows are baseline.

    Args:
        series: the metric over time.
        metrics: number of metrics that are tested; p-values are corrected for it.
        alpha: probability of a false alarm.

    """
    base = baseline_level(series.values)
    excess = np.log(series.values) - base.level
    found = candidates(excess, series.segment, base.threshold)
    # Candidates as small as noise stay in the baseline.
    suspects = [c for c in found if c.mass >= 1.5 * base.threshold]
    quiet = np.ones(len(excess), bool)
    for c in suspects:
        quiet[max(0, c.first - 1) : c.last + 2] = False
    if not suspects or (quiet & np.isfinite(excess)).sum() < 2:
        return [], quiet
    masses = largest_masses(excess, quiet, base.threshold)
    judged = [(c, metrics * (1 + int((masses >= c.mass).sum())) / (1 + len(masses))) for c in suspects]
    return [(c, min(1.0, p)) for c, p in judged if p <= alpha], quiet


def metric_rises(
    series: WindowedSeries, measured: LatencySamples, metrics: int, alpha: float = ALPHA
) -> list[MetricRise]:
    """The significant and large rises of one metric.

    Args:
        series: the metric over time.
        measured: the samples of the series.
        metrics: number of metrics that are tested; p-values are corrected for it.
        alpha: probability of a false alarm.

    """
    if series.too_little:
        return []
    found, quiet = significant(series, metrics, alpha)
    if not found:
        return []
    reference = _Reference(series, measured, quiet)
    made = [reference.rise(*_span(series, c), p) for c, p in found]
    return [rise for rise in made if _large(rise) and metrics * reference.text_probability(rise) <= alpha]


def _span(series: WindowedSeries, candidate: SpikeCandidate) -> tuple[float, float]:
    """Begin and end of a candidate, without the time that windows outside of it also cover."""
    began = float(series.at[candidate.first]) + series.half - HOP
    ended = float(series.at[candidate.last]) - series.half + HOP
    if ended - began >= HOP:
        return began, ended
    middle = (began + ended) / 2
    return middle - HOP / 2, middle + HOP / 2


def _large(rise: MetricRise) -> bool:
    steady = rise.metric in (TTFT, STALL) or rise.ratio.low > 1.0
    return rise.ratio.mean >= MIN_RATIO and steady and rise.delay >= MIN_DELAY


class _Reference:
    """The baseline's raw samples, in blocks for resampling."""

    def __init__(self, series: WindowedSeries, measured: LatencySamples, quiet: Array) -> None:
        self._metric = series.metric
        self._measured = measured
        middles = series.at[quiet]
        ends = measured.ended
        nearest = np.searchsorted(middles, ends)
        close = np.minimum(
            np.abs(ends - middles[np.clip(nearest, 0, len(middles) - 1)]),
            np.abs(ends - middles[np.clip(nearest - 1, 0, len(middles) - 1)]),
        )
        of_baseline = measured.chosen(close <= HOP)
        if series.metric == STALL:
            # The longest wait of a whole baseline is a single event; a window is compared with the usual window.
            values = series.values[quiet & np.isfinite(series.values)]
            of_baseline = replace(LatencySamples.plain(values), ended=middles[: len(values)])
        self._pace = of_baseline.mean()
        self._seconds = len(middles) * HOP
        self._quiet = of_baseline
        self._blocks = _blocks(of_baseline, BLOCK_SECONDS)
        self.value = self._of(of_baseline)
        random = np.random.default_rng(0)
        self._drawn = [
            self._of(
                LatencySamples.joined(
                    [self._blocks[i] for i in random.integers(0, len(self._blocks), len(self._blocks))]
                )
            )
            for _ in range(200)
        ]

    def _of(self, entries: LatencySamples) -> float:
        if self._metric == STALL:
            return float(np.median(entries.values))
        return statistic(self._metric, entries)

    def rise(self, began: float, ended: float, p: float) -> MetricRise:
        inside = self._measured.within(began, ended)
        value = statistic(self._metric, inside)
        random = np.random.default_rng(1)
        if self._metric == STALL:
            # The longest wait is a single event: only the baseline is uncertain.
            drawn = [value] * len(self._drawn)
        else:
            parts = _blocks(inside, HOP if self._metric == PACE else 2 * HOP)
            picks = [random.integers(0, len(parts), len(parts)) for _ in self._drawn]
            drawn = [statistic(self._metric, LatencySamples.joined([parts[i] for i in pick])) for pick in picks]
        low, high = np.quantile(np.array(drawn) / np.array(self._drawn), [0.025, 0.975])
        ratio = Estimate(value / self.value, float(low), float(high))
        delay = value - self.value
        if self._metric not in (TTFT, STALL):
            delay = (ended - began) * (1 - self._pace / inside.mean())
        return MetricRise(self._metric, began, ended, self.value, value, ratio, p, delay)

    def text_probability(self, rise: MetricRise) -> float:
        """The probability that as many answers are as slow as those of a rise because of their texts alone.

        The pace of an answer depends on its text, above all under speculation. With one or two in progress, a second
        of an unpredictable one looks like a slower server to every statistic of tokens. Therefore answers are counted
        here, without the slowest: Student's t of their mean log pace against the baseline's, with a Bonferroni
        correction for the number of places in the run.
        """
        if rise.metric in (TTFT, STALL):
            return 0.0
        slice_seconds = min(rise.ended - rise.began, SLICE_SECONDS)
        usual = list(_paces(self._quiet, slice_seconds).values())
        owners: dict[float, list[float]] = {}
        for (owner, _), pace in _paces(self._measured.within(rise.began, rise.ended), slice_seconds).items():
            owners.setdefault(owner, []).append(pace)
        if len(owners) < MIN_ANSWERS or len(usual) < MIN_ANSWERS:
            return 1.0
        others = sorted(float(np.mean(paces)) for paces in owners.values())[:-1]
        error = float(np.std(usual, ddof=1)) / math.sqrt(len(others))
        places = self._seconds / (rise.ended - rise.began)
        difference = float(np.mean(others) - np.mean(usual))
        return float(min(1.0, places * student.sf(difference / max(error, 1e-9), len(usual) - 1)))


def _paces(entries: LatencySamples, seconds: float) -> dict[tuple[float, float], float]:
    """Log of the mean time between tokens, by answer and slice of the run, where the answer fills a third of it."""
    slices = np.floor(entries.ended / seconds)
    keys, group = np.unique(np.stack([entries.owner, slices]), axis=1, return_inverse=True)
    tokens = np.bincount(group.ravel(), entries.weights)
    took = np.bincount(group.ravel(), entries.weights * entries.values)
    full = took >= seconds / 3
    paces = np.log(took[full] / tokens[full])
    return {(owner, number): pace for owner, number, pace in zip(*keys[:, full], paces, strict=True)}


def _blocks(entries: LatencySamples, seconds: float) -> list[LatencySamples]:
    number = np.floor(entries.ended / seconds).astype(int)
    return [entries.chosen(number == one) for one in np.unique(number)]


def merge_rises(found: Mapping[str, Sequence[MetricRise]]) -> list[list[MetricRise]]:
    """The rises of all metrics, grouped by time into spikes; the most significant and largest rise first."""
    groups: list[list[MetricRise]] = []
    ends = -math.inf
    for rise in sorted((rise for one in found.values() for rise in one), key=lambda rise: rise.began):
        if groups and rise.began <= ends + APART:
            groups[-1].append(rise)
        else:
            groups.append([rise])
            ends = -math.inf
        ends = max(ends, rise.ended)
    return [sorted(group, key=lambda rise: (rise.p, -rise.ratio.mean)) for group in groups]
