"""Whether an arm is better or worse than stock, or not to be told from a second stock server.

Two processes of one kind differ in speed for as long as they live (where their memory lies), which no number of rounds
averages out. So a difference counts only if it is certain, and larger than what two stock servers differ by. The rule,
for each row:

1. The *effect* is the arm's statistic by the geometric mean of both stock servers' (or, for some rows, a difference).
2. Its *certain* interval holds for all rows of the run at once (Bonferroni): noise alone gets any row wrong in one run
   of twenty at most.
3. The *threshold* is the larger of a stated margin and the far end of the 95 % interval of the second stock server by
   the first. The margin stands for what two processes can differ by; where every server was started several
   times, luck averages out, by the root of that number.
4. Better or worse: the certain interval excludes no difference, and the effect lies beyond the threshold. Otherwise: no
   difference.

Intervals of rounds: bootstrap standard errors (rounds drawn again, the same ones for all arms, so that the machine's
drift cancels), widened for their small number by Student's t with ``2 (rounds - 1)`` degrees of freedom: both the
effect and the second stock server's difference tell how large noise is, and the larger one is believed. So is the
spread of single rounds, if it is larger than what rounds drawn again show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import numpy as np
from scipy.stats import t as student

from vllm_instant.tools.measure.statistics import Estimate

Verdict = Literal["better", "worse", "no difference"]
Direction = Literal["higher", "lower", "same"]
"""Which way is better; ``same``: any difference is worse."""
Statistic = Callable[[np.ndarray], float]
"""Of the samples of some rounds, one behind the other along the first axis."""

FALSE_ALARMS = 0.05
"""Chance that noise alone gives any row of a run a verdict; what intervals are shown at, too."""
MARGIN = 0.10
"""What two processes of one kind can differ by in speed on a small machine."""
DRAWS = 500


def margin_for(starts: int) -> float:
    """The stated margin when each server was started so many times: luck averages out by the root of it."""
    return MARGIN / math.sqrt(starts)


@dataclass(frozen=True)
class ResampledRounds:
    """A statistic of an arm, and of its rounds drawn again."""

    value: float
    draws: np.ndarray
    by_round: np.ndarray
    """The statistic of each round alone."""

    @property
    def rounds(self) -> int:
        """How many there are."""
        return len(self.by_round)


@dataclass(frozen=True)
class Contrast:
    """One arm beside stock; ``ratio`` of the two, or ``difference``."""

    scale: Literal["ratio", "difference"]
    better: Direction
    effect: Estimate
    """With its 95 % interval."""
    certain: Estimate
    """With the interval that holds for all rows at once."""
    floor: Estimate
    """The same of the second stock server beside the first, 95 %."""
    threshold: float
    """How far from no difference (1, or 0) the effect must lie; for ratios the factor, above 1."""

    @property
    def verdict(self) -> Verdict:
        """The rule of this module."""
        effect, low, high = map(self._scaled, (self.effect.mean, self.certain.low, self.certain.high))
        if abs(effect) <= self._beyond() or low <= 0 <= high:
            return "no difference"
        return "better" if self.better == ("higher" if effect > 0 else "lower") else "worse"

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {"verdict": self.verdict}

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Self:
        """What ``plain`` was made from."""
        estimates = {name: Estimate(**plain[name]) for name in ("effect", "certain", "floor")}
        return cls(plain["scale"], plain["better"], **estimates, threshold=plain["threshold"])

    def since(self, before: Contrast) -> Contrast:
        """How the arm has changed from an earlier run, each run beside its own stock servers."""
        # Two runs, each with luck of its own.
        luck = math.hypot(self._beyond(), before._beyond())
        return replace(
            self,
            threshold=math.exp(luck) if self.scale == "ratio" else luck,
            effect=_change(before.effect, self.effect, self.scale),
            certain=_change(before.certain, self.certain, self.scale),
            floor=max(self.floor, before.floor, key=lambda floor: _reach(floor, self.scale)),
        )

    def _scaled(self, value: float) -> float:
        """So that 0 is no difference."""
        return math.log(value) if self.scale == "ratio" else value

    def _beyond(self) -> float:
        return self._scaled(self.threshold)


def resample_rounds(
    rounds: Sequence[np.ndarray], statistic: Statistic, draws: int = DRAWS, seed: int = 0
) -> ResampledRounds:
    """A statistic of all rounds' samples, and of rounds drawn again; the same seed draws the same rounds."""
    picks = np.random.default_rng(seed).integers(0, len(rounds), (draws, len(rounds)))
    drawn = [statistic(np.concatenate([rounds[i] for i in pick])) for pick in picks]
    by_round = np.array([statistic(samples) for samples in rounds])
    return ResampledRounds(statistic(np.concatenate(list(rounds))), np.array(drawn), by_round)


def ratio_contrast(
    ours: ResampledRounds,
    stock: ResampledRounds,
    again: ResampledRounds,
    *,
    better: Direction,
    margin: float,
    comparisons: int,
) -> Contrast | None:
    """An arm beside both stock servers, round by round; None where a ratio has no meaning because something is zero.

    Args:
        ours: the arm.
        stock: the stock server.
        again: the second stock server, the A/A arm.
        better: which way is better.
        margin: the stated margin, as a share.
        comparisons: how many rows get a verdict in this run.

    """
    if min(ours.value, stock.value, again.value) <= 0 or min(map(np.min, (ours.draws, stock.draws, again.draws))) <= 0:
        return None
    reference = (np.log(stock.draws) + np.log(again.draws)) / 2
    effect = math.log(ours.value) - (math.log(stock.value) + math.log(again.value)) / 2
    gap = math.log(again.value) - math.log(stock.value)
    gap_error = _error(np.log(again.draws) - np.log(stock.draws), again.by_round, stock.by_round)
    # Were all arms equally noisy, the effect would have 3/4 of the variance of the gap between the stock servers.
    effect_error = _error(np.log(ours.draws) - reference, ours.by_round, np.sqrt(stock.by_round * again.by_round))
    error = max(effect_error, math.sqrt(0.75) * gap_error)
    freedom = 2 * (ours.rounds - 1)
    floor = _interval(gap, gap_error, FALSE_ALARMS, freedom)
    return Contrast(
        "ratio",
        better,
        _exponential(_interval(effect, error, FALSE_ALARMS, freedom)),
        _exponential(_interval(effect, error, FALSE_ALARMS / comparisons, freedom)),
        _exponential(floor),
        math.exp(max(math.log1p(margin), abs(floor.low), abs(floor.high))),
    )


def paired_contrast(
    ours: ResampledRounds, theirs: ResampledRounds, *, better: Direction, margin: float, comparisons: int
) -> Contrast | None:
    """One arm beside another, round by round, where there is no second server of either kind.

    What two processes of one kind differ by is then the stated margin alone. None where a ratio has no meaning.
    """
    if min(ours.value, theirs.value, float(np.min(ours.draws)), float(np.min(theirs.draws))) <= 0:
        return None
    effect = math.log(ours.value) - math.log(theirs.value)
    error = _error(np.log(ours.draws) - np.log(theirs.draws), ours.by_round, theirs.by_round)
    freedom = ours.rounds - 1
    return Contrast(
        "ratio",
        better,
        _exponential(_interval(effect, error, FALSE_ALARMS, freedom)),
        _exponential(_interval(effect, error, FALSE_ALARMS / comparisons, freedom)),
        Estimate(1.0, 1.0, 1.0),
        1 + margin,
    )


def difference_contrast(
    effect: Estimate, certain: Estimate, floor: Estimate, *, better: Direction, margin: float
) -> Contrast:
    """A contrast of estimates that somebody else has made; the effect is 0 where there is none."""
    return Contrast("difference", better, effect, certain, floor, max(margin, abs(floor.low), abs(floor.high)))


def exact_contrast(ours: float, stock: float, again: float, *, better: Direction, margin: float) -> Contrast:
    """The contrast of quantities that have no noise."""
    effect = Estimate(ours / stock, ours / stock, ours / stock)
    floor = Estimate(again / stock, again / stock, again / stock)
    threshold = max(1 + margin, floor.mean, 1 / floor.mean)
    return Contrast("ratio", better, effect, effect, floor, threshold)


def _error(drawn: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Standard error of a log ratio: of the rounds drawn again, and of the rounds one by one; the larger one.

    Where percentiles jump, few rounds drawn again look steadier than they are.

    Args:
        drawn: the log ratio of each draw.
        ours: the statistic of each round alone.
        theirs: likewise.

    """
    rounds = len(ours)
    error = math.sqrt(rounds / (rounds - 1)) * float(np.std(drawn))
    if min(ours.min(), theirs.min()) <= 0:
        return error
    return max(error, float(np.std(np.log(ours / theirs), ddof=1)) / math.sqrt(rounds))


def _interval(centre: float, error: float, chance: float, freedom: int) -> Estimate:
    reach = float(student.isf(chance / 2, freedom)) * error
    return Estimate(centre, centre - reach, centre + reach)


def _exponential(logarithms: Estimate) -> Estimate:
    return Estimate(math.exp(logarithms.mean), math.exp(logarithms.low), math.exp(logarithms.high))


def _change(before: Estimate, after: Estimate, scale: str) -> Estimate:
    """After by before; the reaches of both intervals add up as errors do."""
    forward = math.log if scale == "ratio" else float
    backward = math.exp if scale == "ratio" else float
    centre = forward(after.mean) - forward(before.mean)
    down = math.hypot(forward(after.mean) - forward(after.low), forward(before.high) - forward(before.mean))
    up = math.hypot(forward(after.high) - forward(after.mean), forward(before.mean) - forward(before.low))
    return Estimate(backward(centre), backward(centre - down), backward(centre + up))


def _reach(floor: Estimate, scale: str) -> float:
    ends = (floor.low, floor.high)
    return max(abs(math.log(end)) if scale == "ratio" else abs(end) for end in ends)
