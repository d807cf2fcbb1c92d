"""Keeps a lossy router within its quality budget: loosens on evidence that it is exceeded, tightens again cautiously.

It counts steps and uses neither a clock nor random numbers, so that all workers come to the same decisions.

Level 0 is the configured expert budget, the last level the model's own routing. Measurements of a level are discarded
when it is left. The KL divergence per token has a heavy tail, so the mean and deviation of a few tokens prove little.
The test is therefore a bet against the quality budget (an e-process: Waudby-Smith and Ramdas 2024; restarted at 1 when
it loses, Shin, Ramdas and Rinaldo 2023): each measured mean x with limit m multiplies the wealth by

    1 + stake * (x / m - 1).

While the true mean is within the limit, the wealth is a supermartingale whatever the tail, and reaches ``ALARM`` at
most once per ``ALARM`` measurements on average; beyond the limit it grows exponentially.

Returning to a tighter level needs a mean well below the limit and, after each relapse, twice the number of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

NUM_LEVELS = 5
ALARM = 1000.0
"""Wealth of the bet at which the quality budget counts as exceeded."""
SUSPICION = 10.0
"""Wealth from which reference passes are more frequent."""
STAKES = (0.05, 0.2, 0.6)
"""Fractions of the wealth that are bet: small ones detect small excesses, large ones detect large excesses quickly."""
NUM_STANDARD_ERRORS = 2.5
"""Standard errors by which the mean must be below the limit before a tighter level is tried."""
MEMORY = 40.0
"""Time constant of the means, in measurements."""
MIN_MEASUREMENTS = 8
"""Measurements needed before a tighter level is tried."""
MIN_COUNTED = 4
"""Counted steps needed before the kept mass is compared with its limit."""
TIGHTENING_FRACTION = 0.5
"""A tighter level is tried if the mean is below this fraction of the limit."""
MIN_PATIENCE = 2000
"""Steps at a level before a tighter one is tried; they double with each relapse, up to ``MAX_PATIENCE``."""
MAX_PATIENCE = 256_000


class GateDecision(Enum):
    """The change of the level after a measurement."""

    UNCHANGED = "unchanged"
    LOOSENED = "loosened"
    TIGHTENED = "tightened"


@dataclass
class LevelEvidence:
    """Measurements of one level; each is the mean KL divergence of the tokens compared in one step."""

    num_measured: float = 0.0
    kl: float = 0.0
    kl_squared: float = 0.0
    num_counted: float = 0.0
    kept: float = 0.0
    log_wealth: list[float] = field(default_factory=lambda: [0.0] * len(STAKES))
    """Logarithm of the wealth for each stake, at least 0."""

    def add_divergence(self, mean: float, limit: float) -> None:
        """Add one measurement, in nats per token, and bet on it against the limit."""
        fade = 1.0 - 1.0 / MEMORY
        self.num_measured = fade * self.num_measured + 1.0
        self.kl = fade * self.kl + mean
        self.kl_squared = fade * self.kl_squared + mean * mean
        self.log_wealth = [
            max(0.0, wealth + math.log1p(stake * (mean / limit - 1.0)))
            for stake, wealth in zip(STAKES, self.log_wealth, strict=True)
        ]

    def add_kept_mass(self, kept: float) -> None:
        """Add the fraction of the router's weights that a counted step kept."""
        fade = 1.0 - 1.0 / MEMORY
        self.num_counted = fade * self.num_counted + 1.0
        self.kept = fade * self.kept + kept

    @property
    def wealth(self) -> float:
        """Mean wealth over the stakes, at least 1."""
        return sum(math.exp(min(wealth, 50.0)) for wealth in self.log_wealth) / len(STAKES)

    @property
    def mean_kl(self) -> float | None:
        """Mean KL divergence in nats per token; None before the first measurement."""
        return self.kl / self.num_measured if self.num_measured else None

    @property
    def mean_kept(self) -> float | None:
        """Mean kept fraction of the router's weights; None before the first counted step."""
        return self.kept / self.num_counted if self.num_counted else None

    def standard_error(self) -> float:
        """Standard error of the mean KL divergence."""
        if self.num_measured < 2:
            return math.inf
        mean = self.kl / self.num_measured
        variance = (
            max(0.0, self.kl_squared / self.num_measured - mean * mean) * self.num_measured / (self.num_measured - 1)
        )
        return math.sqrt(variance / self.num_measured)


@dataclass
class QualityGate:
    """Decides how many experts a step may use.

    Args:
        budget: fraction of a layer's experts that level 0 allows per step.
        max_kl: maximum mean KL divergence of the next-token distribution from the model's own, in nats per token.
        min_kept: minimum fraction of the router's weights that must be kept; 0 for no limit.

    """

    budget: float
    max_kl: float
    min_kept: float = 0.0
    level: int = 0
    since: int = 0
    """Step at which the level was entered."""
    patience: int = MIN_PATIENCE
    loosened: int = 0
    """Number of times that the level was loosened."""
    evidence: LevelEvidence = field(default_factory=LevelEvidence)
    _entered_by_tightening: bool = False

    @property
    def last(self) -> int:
        """The level of the model's own routing."""
        return NUM_LEVELS - 1

    def share(self, level: int | None = None) -> float:
        """Fraction of a layer's experts that a level allows; 1 at the last level."""
        level = self.level if level is None else level
        return self.budget + (1.0 - self.budget) * level / self.last

    @property
    def compared_level(self) -> int | None:
        """The level that a reference pass runs at: None for the model's own routing.

        At the last level served routing is the model's own; the reference pass then measures the next tighter level.
        """
        return self.last - 1 if self.level == self.last else None

    def start(self, budget: float, step: int) -> None:
        """Restart at level 0 with another budget."""
        self.budget, self.level, self.since, self.patience = budget, 0, step, MIN_PATIENCE
        self.evidence = LevelEvidence()

    @property
    def suspicious(self) -> bool:
        """Whether the level may exceed the quality budget, so that reference passes should be more frequent."""
        return self.level < self.last and self.evidence.wealth >= SUSPICION

    def observe(self, step: int, kl: float | None = None, kept: float | None = None) -> GateDecision:
        """Learn from a measured step.

        Args:
            step: number of the step.
            kl: mean KL divergence of the compared tokens in nats; None if none was compared.
            kept: kept fraction of the router's weights; None if the step was not counted. Ignored at the last level,
                where no expert is refused.

        """
        if kl is not None:
            self.evidence.add_divergence(kl, self.max_kl)
        if kept is not None and self.level < self.last:
            self.evidence.add_kept_mass(kept)
        if self.level < self.last and self._exceeded():
            if self._entered_by_tightening:  # A relapse: wait longer before the next attempt.
                self.patience = min(2 * self.patience, MAX_PATIENCE)
            self.loosened += 1
            return self._move(self.level + 1, step, GateDecision.LOOSENED)
        if self.level > 0 and step - self.since >= self.patience and self._may_tighten():
            return self._move(self.level - 1, step, GateDecision.TIGHTENED)
        return GateDecision.UNCHANGED

    def _move(self, level: int, step: int, decision: GateDecision) -> GateDecision:
        self.level, self.since, self.evidence = level, step, LevelEvidence()
        self._entered_by_tightening = decision is GateDecision.TIGHTENED
        return decision

    def _exceeded(self) -> bool:
        evidence = self.evidence
        kept = evidence.mean_kept
        if kept is not None and evidence.num_counted >= MIN_COUNTED and kept < self.min_kept:
            return True
        return evidence.wealth >= ALARM

    def _may_tighten(self) -> bool:
        evidence = self.evidence
        mean, kept = evidence.mean_kl, evidence.mean_kept
        if kept is not None and kept < self.min_kept + 0.5 * (1.0 - self.min_kept) * (self.min_kept > 0):
            return False
        return (
            mean is not None
            and evidence.num_measured >= MIN_MEASUREMENTS
            and mean + NUM_STANDARD_ERRORS * evidence.standard_error() < self._tightening_limit()
        )

    def _tightening_limit(self) -> float:
        # At the last level the measurements are of the next tighter level itself, elsewhere of a looser one than it.
        return self.max_kl if self.level == self.last else TIGHTENING_FRACTION * self.max_kl
