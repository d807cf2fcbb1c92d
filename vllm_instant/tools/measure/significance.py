"""What a comparison says: better or worse than the baseline, the same, or undecided.

Two processes of one kind differ in speed for as long as they live (where their memory lies), which no number of rounds
averages out. A difference therefore counts only if it is certain, and larger than the difference of two baseline
servers. The rule, for each row:

1. The *effect* is the arm's statistic divided by the geometric mean of both baseline servers' (for some rows, a
   difference). It is shown with its 95 % interval.
2. The *certain* interval holds for all rows of a run at once (Bonferroni): noise alone gives any row the verdict better
   or worse in at most one run of twenty.
3. The *margin* is stated beforehand: what two processes can differ by. Where every server was started several times,
   it shrinks with the square root of their number. The *threshold* is the larger of the margin and the far end of the
   95 % interval of the second baseline server divided by the first.
4. *Better* or *worse*: the certain interval excludes zero difference, and the effect lies beyond the threshold.
   *Same*: the 95 % interval lies within the margin (an equivalence test: a row whose processes differ by the margin
   gets this verdict in at most one of forty cases). Otherwise *undecided*, with the number of rounds that would decide.

A run that adds rounds until everything is decided looks at the data several times; both intervals then hold for all
looks at once (Bonferroni again).

Intervals of rounds: bootstrap standard errors (rounds resampled, the same ones for all arms, so that drift of the
machine cancels), widened for their small number by Student's t with ``2 (rounds - 1)`` degrees of freedom: both the
effect and the difference of the baseline servers are estimates of the noise, and the larger one is used. So is the
spread of single rounds where it is larger than what resampling shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter
from scipy.stats import t as student

from vllm_instant.tools.measure.statistics import Estimate

Verdict = Literal["better", "worse", "same", "undecided"]
Direction = Literal["higher", "lower", "same"]
"""Which direction is better; ``same``: any difference is worse."""
Statistic = Callable[[np.ndarray], float]
"""Of the samples of some rounds, concatenated along the first axis."""

FALSE_ALARMS = 0.05
"""Probability that noise alone gives any row of a run the verdict better or worse; the shown intervals' error, too."""
MARGIN = 0.10
"""What two processes of one kind can differ by in speed on a small machine."""
DRAWS = 500
MAX_ROUNDS_FACTOR = 100
"""A row that needs more than this many times its rounds counts as not decidable by rounds."""


def margin_for(starts: int) -> float:
    """The stated margin when each server is started ``starts`` times: luck averages out with the square root."""
    return MARGIN / math.sqrt(starts)


@dataclass(frozen=True)
class ResampledRounds:
    """A statistic of an arm, and of its rounds resampled."""

    value: float
    draws: np.ndarray
    by_round: np.ndarray
    """The statistic of each round alone."""

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.by_round)


@dataclass(frozen=True)
class Contrast:
    """One arm compared with the baseline; ``ratio`` of the two, or ``difference``."""

    scale: Literal["ratio", "difference"]
    better: Direction
    effect: Estimate
    """With its 95 % interval."""
    certain: Estimate
    """With the interval that holds for all rows at once."""
    floor: Estimate
    """The same comparison of the second baseline server with the first, 95 %."""
    threshold: float
    """Minimum distance from zero difference (1, or 0) for better or worse; for ratios a factor above 1."""
    margin: float | None = None
    """Maximum distance from zero difference for the verdict same, likewise; the threshold if None."""
    rounds: int = 0
    """Number of rounds that it was measured in; 0 where further rounds would not change it."""

    @property
    def verdict(self) -> Verdict:
        """The rule of this module."""
        effect, certain = self._scaled(self.effect), self._scaled(self.certain)
        if abs(effect.mean) > self._distance(self.threshold) and not certain.low <= 0 <= certain.high:
            return "better" if self.better == ("higher" if effect.mean > 0 else "lower") else "worse"
        if max(-effect.low, effect.high) <= self._same_within():
            return "same"
        return "undecided"

    def rounds_to_decide(self) -> int | None:
        """About how many further rounds would decide an undecided row; None where rounds cannot.

        Interval widths shrink with the square root of the number of rounds; the effect is taken as it is.
        """
        if self.verdict != "undecided" or not self.rounds:
            return None
        effect, certain, floor = map(self._scaled, (self.effect, self.certain, self.floor))
        distance, margin = abs(effect.mean), self._same_within()
        if distance < margin:
            reach = max(effect.high - effect.mean, effect.mean - effect.low)
            factor = (reach / (margin - distance)) ** 2
        else:
            # The certain interval must exclude zero, and the far end of the floor must come below the effect.
            certain_reach = max(certain.high - certain.mean, certain.mean - certain.low)
            floor_reach = max(floor.high - floor.mean, floor.mean - floor.low)
            if distance <= max(margin, abs(floor.mean)):
                return None
            factor = max(certain_reach / distance, floor_reach / (distance - abs(floor.mean))) ** 2
        if not factor <= MAX_ROUNDS_FACTOR:
            return None
        return max(1, math.ceil(self.rounds * (factor - 1)))

    def plain(self) -> dict[str, Any]:
        """The fields as JSON types, with the verdict."""
        return asdict(self) | {"verdict": self.verdict, "rounds_to_decide": self.rounds_to_decide()}

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Contrast:
        """The contrast that ``plain`` describes; also one of format 1, which has no margin."""
        return _CONTRAST.validate_python(plain)

    def since(self, before: Contrast) -> Contrast:
        """How the arm has changed since an earlier run, each run compared with its own baseline servers."""
        # Process luck of two independent runs adds up as errors do.
        luck = math.hypot(self._distance(self.threshold), before._distance(before.threshold))
        margin = math.hypot(self._same_within(), before._same_within())
        return replace(
            self,
            threshold=self._unscaled(luck),
            margin=self._unscaled(margin),
            rounds=0,
            effect=_change(before.effect, self.effect, self.scale),
            certain=_change(before.certain, self.certain, self.scale),
            floor=max(self.floor, before.floor, key=lambda floor: _reach(floor, self.scale)),
        )

    def _scaled(self, found: Estimate) -> Estimate:
        """On the scale where 0 is no difference and both directions are alike."""
        if self.scale == "difference":
            return found
        return Estimate(*(math.log(value) if value > 0 else -math.inf for value in (found.mean, found.low, found.high)))

    def _distance(self, limit: float) -> float:
        return math.log(limit) if self.scale == "ratio" else limit

    def _unscaled(self, distance: float) -> float:
        return math.exp(distance) if self.scale == "ratio" else distance

    def _same_within(self) -> float:
        return self._distance(self.threshold if self.margin is None else self.margin)


_CONTRAST = TypeAdapter(Contrast)


def resample_rounds(
    rounds: Sequence[np.ndarray], statistic: Statistic, draws: int = DRAWS, seed: int = 0
) -> ResampledRounds:
    """A statistic of all rounds' samples, and of resampled rounds; the same seed draws the same rounds."""
    picks = np.random.default_rng(seed).integers(0, len(rounds), (draws, len(rounds)))
    drawn = [statistic(np.concatenate([rounds[i] for i in pick])) for pick in picks]
    by_round = np.array([statistic(samples) for samples in rounds])
    return ResampledRounds(statistic(np.concatenate(list(rounds))), np.array(drawn), by_round)


def ratio_contrast(
    ours: ResampledRounds,
    baseline: ResampledRounds,
    again: ResampledRounds,
    *,
    better: Direction,
    margin: float,
    comparisons: int,
    looks: int = 1,
) -> Contrast | None:
    """An arm compared with both baseline servers, round by round; None where a value is zero and has no ratio.

    Args:
        ours: the arm.
        baseline: the baseline server.
        again: the second baseline server, the A/A arm.
        better: which direction is better.
        margin: the stated margin, as a share.
        comparisons: number of rows that get a verdict in this run.
        looks: how often the run looks at its data.

    """
    if min(_lowest(arm) for arm in (ours, baseline, again)) <= 0:
        return None
    reference = (np.log(baseline.draws) + np.log(again.draws)) / 2
    effect = math.log(ours.value) - (math.log(baseline.value) + math.log(again.value)) / 2
    gap = math.log(again.value) - math.log(baseline.value)
    gap_error = _error(np.log(again.draws) - np.log(baseline.draws), again.by_round, baseline.by_round)
    # With equally noisy arms, the effect has 3/4 of the variance of the gap between the baseline servers:
    # s² + s²/2 for one arm against the mean of two, 2 s² for one against one.
    effect_error = _error(np.log(ours.draws) - reference, ours.by_round, np.sqrt(baseline.by_round * again.by_round))
    error = max(effect_error, math.sqrt(0.75) * gap_error)
    freedom = 2 * (ours.rounds - 1)
    floor = _interval(gap, gap_error, FALSE_ALARMS, freedom)
    return Contrast(
        "ratio",
        better,
        _exponential(_interval(effect, error, FALSE_ALARMS / looks, freedom)),
        _exponential(_interval(effect, error, FALSE_ALARMS / comparisons / looks, freedom)),
        _exponential(floor),
        math.exp(max(math.log1p(margin), abs(floor.low), abs(floor.high))),
        1 + margin,
        ours.rounds,
    )


def paired_contrast(
    ours: ResampledRounds, theirs: ResampledRounds, *, better: Direction, margin: float, comparisons: int
) -> Contrast | None:
    """One arm compared with another, round by round, where there is no second server of either kind.

    The stated margin alone then stands for what two processes of one kind differ by. None where a value is zero.
    """
    if min(_lowest(ours), _lowest(theirs)) <= 0:
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
        1 + margin,
        ours.rounds,
    )


def difference_contrast(
    effect: Estimate, certain: Estimate, floor: Estimate, *, better: Direction, margin: float
) -> Contrast:
    """A contrast of given estimates, whose effect is 0 where there is no difference."""
    threshold = max(margin, abs(floor.low), abs(floor.high))
    return Contrast("difference", better, effect, certain, floor, threshold, margin)


def exact_contrast(ours: float, baseline: float, again: float, *, better: Direction, margin: float) -> Contrast:
    """The contrast of quantities without noise."""
    effect = Estimate(ours / baseline, ours / baseline, ours / baseline)
    floor = Estimate(again / baseline, again / baseline, again / baseline)
    threshold = max(1 + margin, floor.mean, 1 / floor.mean)
    return Contrast("ratio", better, effect, effect, floor, threshold)


def _lowest(arm: ResampledRounds) -> float:
    return min(arm.value, float(np.min(arm.draws)))


def _error(drawn: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Standard error of a log ratio: of resampled rounds or of single rounds, whichever is larger.

    A percentile jumps from sample to sample, so that few resampled rounds look steadier than they are.

    Args:
        drawn: the log ratio of each resample.
        ours: the statistic of each round alone.
        theirs: the same of the other arm.

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
    """After divided by before; interval widths add up as independent errors do."""
    forward = math.log if scale == "ratio" else float
    backward = math.exp if scale == "ratio" else float
    centre = forward(after.mean) - forward(before.mean)
    down = math.hypot(forward(after.mean) - forward(after.low), forward(before.high) - forward(before.mean))
    up = math.hypot(forward(after.high) - forward(after.mean), forward(before.mean) - forward(before.low))
    return Estimate(backward(centre), backward(centre - down), backward(centre + up))


def _reach(floor: Estimate, scale: str) -> float:
    ends = (floor.low, floor.high)
    return max(abs(math.log(end)) if scale == "ratio" else abs(end) for end in ends)
