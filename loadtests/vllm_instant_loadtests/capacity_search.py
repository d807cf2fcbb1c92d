"""The highest rate at which goals hold, from noisy probes: a sequential search with an interval.

A probe at one rate counts how many requests were within each goal. Requests of one probe depend on each other (they
wait in the same queue), so that two probes at the same rate differ by more than independent requests do. Bisection on
one probe per rate takes that luck for truth and reports no error. Here each goal has a model,

    share(rate) = logistic(logit(target) - slope * (log(rate) - log(capacity)))
    requests within the goal ~ beta-binomial(requests, share(rate), correlation)

whose three parameters have a joint posterior on a grid (all log-uniform a priori). The capacity is the smallest of all
goals' capacities. The next rate is a quantile of its posterior, as in probabilistic bisection (Waeber, Frazier and
Henderson 2013), so that probes gather where they are informative; the search ends when the 95 % interval is narrow
enough. The logistic curve holds near the capacity only: probes far from it count less.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import betaln, expit, logit

from vllm_instant.tools.measure.significance import FALSE_ALARMS, MARGIN, Contrast
from vllm_instant.tools.measure.statistics import Estimate
from vllm_instant_loadtests.capacity_goals import ProbeResult, ShareGoal

Array = npt.NDArray[np.float64]
STEP = 0.02
"""Distance of two rates of the grid, as a difference of logarithms; quantiles are interpolated."""
REACH = 3.5
"""The grid ends at this factor (a difference of logarithms) from the rate at which the search begins."""
SLOPES = np.geomspace(1.5, 80.0, 10)
CORRELATIONS = np.geomspace(0.003, 0.5, 6)
QUANTILES = (0.5, 0.3, 0.7)
"""Of the posterior, in turn: rates on both sides determine the slope."""
NEAR = 0.35
"""Probes further than this from the capacity (a difference of logarithms) count less."""
MIN_WEIGHT = 0.1
MAX_GROWTH = 2.0
"""A rate is at most this many times the highest one that has been tried."""
MIN_PROBES = 8
ERROR = 0.03
"""The ends of a capacity's interval leave out this share of the posterior: a search ends when its interval is narrow,
which lucky ones do too early, so that 95 % of the posterior held the capacity in fewer than 95 % of simulated searches
(``benchmarks/capacity.py simulated``)."""


@dataclass(frozen=True)
class SearchLimits:
    """When a search ends."""

    precision: float = 0.10
    """Half width of the 95 % interval, as a share."""
    max_probes: int = 40


class CapacitySearch:
    """The search on one server; pure arithmetic, no clock.

    Args:
        goals: that should hold.
        start: rate of the first probe.
        limits: when it ends.

    """

    def __init__(self, goals: Sequence[ShareGoal], start: float, limits: SearchLimits | None = None) -> None:
        self.goals, self.limits = list(goals), limits or SearchLimits()
        count = round(REACH / STEP)
        self.grid: Array = np.log(start) + np.arange(-count, count + 1) * STEP
        self.probes: list[ProbeResult] = []
        self._likelihoods: dict[str, list[Array]] = {goal.name: [] for goal in goals}
        self._chances: dict[str, Array] | None = None

    def next_rate(self) -> float:
        """The rate of the next probe."""
        if not self.probes:
            return float(np.exp(self.grid[len(self.grid) // 2]))
        wanted = _quantile(self.grid, self.posterior(), QUANTILES[len(self.probes) % len(QUANTILES)])
        highest = max(np.log(probe.rate) for probe in self.probes)
        lowest = min(np.log(probe.rate) for probe in self.probes)
        step = float(np.log(MAX_GROWTH))
        return float(np.exp(np.clip(wanted, lowest - 2 * step, highest + step)))

    def observe(self, probe: ProbeResult) -> None:
        """Add a probe."""
        self.probes.append(probe)
        self._chances = None
        for goal in self.goals:
            if goal.name in probe.counts:
                self._likelihoods[goal.name].append(self._likelihood(goal, probe))
            else:
                self._likelihoods[goal.name].append(np.zeros((len(self.grid), len(SLOPES), len(CORRELATIONS))))

    @property
    def finished(self) -> bool:
        """Whether the interval is narrow enough, or the number of probes exhausted."""
        if len(self.probes) < MIN_PROBES:
            return False
        if len(self.probes) >= self.limits.max_probes:
            return True
        found = self.estimate()
        return math.log(found.high / found.low) <= 2 * math.log1p(self.limits.precision)

    def estimate(self) -> Estimate:
        """The median of the capacity's posterior with its 95 % interval."""
        return _estimate(self.grid, self.posterior(), ERROR)

    @property
    def bounded(self) -> bool:
        """Whether goals held in some probe and were missed in another, so that the interval is no end of the grid."""
        found = self.estimate()
        return bool(self.grid[0] + 0.5 < math.log(found.low) and math.log(found.high) < self.grid[-1] - 0.5)

    def posterior(self) -> Array:
        """Probability of each rate of the grid to be the capacity, ``[rates]``.

        The goals are counted on the same requests, and the luck of a probe is in all of them: the probability that all
        capacities lie beyond a rate is that of the goal with the smallest one, not the product.
        """
        later = np.min([1 - np.cumsum(chances) for chances in self._by_goal().values()], axis=0)
        found: Array = np.maximum(-np.diff(later, prepend=1.0), 0.0)
        found /= found.sum()
        return found

    def deciding_goal(self) -> str:
        """The goal that most probably is the first to be missed when the rate rises."""
        by_goal = self._by_goal()
        return min(by_goal, key=lambda name: _quantile(self.grid, by_goal[name], 0.5))

    def curve(self, rates: Array) -> dict[str, Array]:
        """The expected share within each goal at some rates, by goal, ``[rates]``."""
        found = {}
        for goal in self.goals:
            weights = self._joint(goal.name).sum(2)
            capacity = (weights * self.grid[:, None]).sum() / weights.sum()
            slope = np.exp((weights * np.log(SLOPES)).sum() / weights.sum())
            found[goal.name] = expit(logit(goal.target) - slope * (np.log(rates) - capacity))
        return found

    def _by_goal(self) -> dict[str, Array]:
        if self._chances is None:
            marginals = {goal.name: self._joint(goal.name).sum((1, 2)) for goal in self.goals}
            self._chances = {name: marginal / marginal.sum() for name, marginal in marginals.items()}
        return self._chances

    def _joint(self, name: str) -> Array:
        """The unnormalized posterior of one goal, ``[rates, slopes, correlations]``."""
        terms = self._likelihoods[name]
        if not terms:
            return np.ones((len(self.grid), len(SLOPES), len(CORRELATIONS)))
        total = np.sum(terms, axis=0)
        marginal = _normalized(total).sum((1, 2))
        middle = _quantile(self.grid, marginal / marginal.sum(), 0.5)
        away = np.array([np.log(probe.rate) - middle for probe in self.probes])
        weights = np.maximum(np.exp(-0.5 * (away / NEAR) ** 2), MIN_WEIGHT)
        weighted: Array = np.tensordot(weights, np.asarray(terms), 1)
        return _normalized(weighted)

    def _likelihood(self, goal: ShareGoal, probe: ProbeResult) -> Array:
        """Log likelihood of a probe, ``[rates, slopes, correlations]``."""
        good, total = probe.counts[goal.name]
        away = np.log(probe.rate) - self.grid[:, None]
        share = expit(logit(goal.target) - SLOPES * away)[:, :, None]
        share = np.clip(share, 1e-9, 1 - 1e-9)
        spread = (1 - CORRELATIONS) / CORRELATIONS
        a, b = share * spread, (1 - share) * spread
        found: Array = betaln(good + a, total - good + b) - betaln(a, b)
        return found


def compare_capacity(searches: Mapping[str, CapacitySearch]) -> dict[tuple[str, str], Contrast]:
    """Each later server compared with each earlier one, by (ours, theirs).

    The difference of two posteriors; servers are probed in turn, so that the machine's drift is in both. Two processes
    of one kind can differ by the margin of ``significance``, which no number of probes averages out.
    """
    pairs = list(itertools.combinations(searches, 2))
    found = {}
    for theirs, ours in pairs:
        first, second = searches[ours], searches[theirs]
        steps = np.arange(-len(second.grid) + 1, len(first.grid), dtype=np.float64)
        grid: Array = steps * STEP + float(first.grid[0] - second.grid[0])
        chances: Array = np.convolve(first.posterior(), second.posterior()[::-1]).astype(np.float64)
        found[ours, theirs] = Contrast(
            "ratio",
            "higher",
            _estimate(grid, chances, FALSE_ALARMS),
            _estimate(grid, chances, FALSE_ALARMS / len(pairs)),
            Estimate(1.0, 1.0, 1.0),
            1 + MARGIN,
            1 + MARGIN,
            min(len(first.probes), len(second.probes)),
        )
    return found


def _normalized(logarithms: Array) -> Array:
    found: Array = np.exp(logarithms - logarithms.max())
    return found


def _quantile(grid: Array, chances: Array, share: float) -> float:
    """Interpolated within a step of the grid."""
    return float(np.interp(share, np.cumsum(chances) - chances / 2, grid))


def _estimate(grid: Array, chances: Array, error: float) -> Estimate:
    middle, low, high = (np.exp(_quantile(grid, chances, share)) for share in (0.5, error / 2, 1 - error / 2))
    return Estimate(float(middle), float(low), float(high))
