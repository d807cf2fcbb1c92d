"""Keeps a lossy router within its quality budget: loosens on evidence that it is exceeded, recovers with care.

Plain Python, told in numbers of steps; no clock and no chance, so that all workers come to the same decisions.

Level 0 is the configured budget, the last one the model's own routing. What is measured of a level is forgotten when
it is left. The divergence of tokens has a heavy tail, so that means and deviations of a few of them prove little. The
alarm is a bet against the budget (an e-process: Waudby-Smith and Ramdas 2024; restarted at 1 when it loses, Shin,
Ramdas and Rinaldo 2023): with each measured mean x and limit m the stake is multiplied by 1 + l (x / m - 1). While the
true mean keeps the limit, whatever the tail, an alarm at ``ALARM`` comes at most once in so many measurements on
average; beyond the limit the stake grows, the faster the further beyond.

To go back a level takes a mean well below the limit, and after each relapse twice the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

LEVELS = 5
ALARM = 1000.0
SUSPICION = 10.0
"""A stake from which on it is worth to look more often."""
STAKES = (0.05, 0.2, 0.6)
"""Shares that are bet: small ones find small excesses, large ones find large ones at once."""
SIGMAS = 2.5
MEMORY = 40.0
"""About so many measurements count for means."""
FEWEST = 8
"""Measurements before a level is judged good."""
MIN_COUNTED = 4
"""Counted steps before the kept mass is believed."""
COMFORT = 0.5
"""A tighter level is tried when the mean is below this share of the limit."""
FIRST_PATIENCE = 2000
"""Steps that a level must have held before a tighter one is tried …"""
MAX_PATIENCE = 256_000
"""… which doubles with each relapse up to this."""


class Verdict(Enum):
    """What became of the level."""

    STAYS = "stays"
    LOOSENED = "loosened"
    TIGHTENED = "tightened"


@dataclass
class Evidence:
    """What is known of one level; a measurement is the mean divergence of the tokens that a step compared."""

    measured: float = 0.0
    kl: float = 0.0
    kl_squared: float = 0.0
    counted: float = 0.0
    kept: float = 0.0
    winnings: list[float] = field(default_factory=lambda: [0.0] * len(STAKES))
    """Logarithms of what each stake has become, 0 at least."""

    def add_divergence(self, mean: float, limit: float) -> None:
        """One measurement, in nats a token, against the limit."""
        fade = 1.0 - 1.0 / MEMORY
        self.measured = fade * self.measured + 1.0
        self.kl = fade * self.kl + mean
        self.kl_squared = fade * self.kl_squared + mean * mean
        self.winnings = [
            max(0.0, won + math.log1p(stake * (mean / limit - 1.0)))
            for stake, won in zip(STAKES, self.winnings, strict=True)
        ]

    def add_kept(self, share: float) -> None:
        """The share of the router's mass that a counted step kept."""
        fade = 1.0 - 1.0 / MEMORY
        self.counted = fade * self.counted + 1.0
        self.kept = fade * self.kept + share

    @property
    def stake(self) -> float:
        """What the bets against the limit have become on average; 1 at least."""
        return sum(math.exp(min(won, 50.0)) for won in self.winnings) / len(STAKES)

    @property
    def mean_kl(self) -> float | None:
        """Nats a token; None before any was measured."""
        return self.kl / self.measured if self.measured else None

    @property
    def mean_kept(self) -> float | None:
        """Share of the mass; None before any was measured."""
        return self.kept / self.counted if self.counted else None

    def standard_error(self) -> float:
        """Of the mean divergence."""
        if self.measured < 2:
            return math.inf
        mean = self.kl / self.measured
        variance = max(0.0, self.kl_squared / self.measured - mean * mean) * self.measured / (self.measured - 1)
        return math.sqrt(variance / self.measured)


@dataclass
class QualityGate:
    """Decides how tight routing may be.

    Args:
        budget: the share of experts a step that level 0 allows.
        max_kl: mean divergence of the next-token distribution from the model's own that is allowed, nats a token.
        min_kept: share of the router's mass that must be kept; 0 for no such limit.

    """

    budget: float
    max_kl: float
    min_kept: float = 0.0
    level: int = 0
    since: int = 0
    """Step at which the level was taken."""
    patience: int = FIRST_PATIENCE
    loosened: int = 0
    """Times that the limit was found exceeded."""
    evidence: Evidence = field(default_factory=Evidence)
    _tried: bool = False
    """Whether the level was reached from a looser one."""

    @property
    def last(self) -> int:
        """The level at which the model routes by itself."""
        return LEVELS - 1

    def share(self, level: int | None = None) -> float:
        """The share of experts that a level allows, 1 at the last."""
        level = self.level if level is None else level
        return self.budget + (1.0 - self.budget) * level / self.last

    @property
    def compared_level(self) -> int | None:
        """What a shadow pass shall run as: None for the model's own routing, else a level that is being tried."""
        return self.last - 1 if self.level == self.last else None

    def start(self, budget: float, step: int) -> None:
        """Begin anew at level 0 with another budget."""
        self.budget, self.level, self.since, self.patience = budget, 0, step, FIRST_PATIENCE
        self.evidence = Evidence()

    @property
    def suspicious(self) -> bool:
        """Whether the level may be beyond the budget, so that it is worth to look more often."""
        return self.level < self.last and self.evidence.stake >= SUSPICION

    def observe(self, step: int, kl: float | None = None, kept: float | None = None) -> Verdict:
        """Learn from a step that was looked at.

        Args:
            step: its number.
            kl: mean divergence of the tokens that were compared, nats; None if none was.
            kept: share of the router's mass that was kept; None if nothing was counted. Means nothing at the last
                level, where nothing is refused.

        """
        if kl is not None:
            self.evidence.add_divergence(kl, self.max_kl)
        if kept is not None and self.level < self.last:
            self.evidence.add_kept(kept)
        if self.level < self.last and self._exceeded():
            if self._tried:  # a try that failed: the next one comes later
                self.patience = min(2 * self.patience, MAX_PATIENCE)
            self.loosened += 1
            return self._move(self.level + 1, step, Verdict.LOOSENED)
        if self.level > 0 and step - self.since >= self.patience and self._comfortable():
            return self._move(self.level - 1, step, Verdict.TIGHTENED)
        return Verdict.STAYS

    def _move(self, level: int, step: int, verdict: Verdict) -> Verdict:
        self.level, self.since, self.evidence = level, step, Evidence()
        self._tried = verdict is Verdict.TIGHTENED
        return verdict

    def _exceeded(self) -> bool:
        found = self.evidence
        kept = found.mean_kept
        if kept is not None and found.counted >= MIN_COUNTED and kept < self.min_kept:
            return True
        return found.stake >= ALARM

    def _comfortable(self) -> bool:
        found = self.evidence
        mean, kept = found.mean_kl, found.mean_kept
        if kept is not None and kept < self.min_kept + 0.5 * (1.0 - self.min_kept) * (self.min_kept > 0):
            return False
        return (
            mean is not None and found.measured >= FEWEST and mean + SIGMAS * found.standard_error() < self._comfort()
        )

    def _comfort(self) -> float:
        # At the last level the next one itself is compared, elsewhere one that is looser than what will be tried.
        return self.max_kl if self.level == self.last else COMFORT * self.max_kl
