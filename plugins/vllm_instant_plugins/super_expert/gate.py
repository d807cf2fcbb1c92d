"""Keeps a lossy router within its quality budget: loosens while evidence says that it is exceeded, recovers with care.

Plain Python, told in numbers of steps; no clock and no chance, so that all workers come to the same decisions.

Level 0 is the configured budget, the last one the model's own routing. What is measured of a level is forgotten when
it is left. The divergence of tokens has a heavy tail, so that few of them prove little: until ``ENOUGH_TOKENS`` are
seen the mean must exceed the limit by ``SIGMAS`` standard errors, from then on by nothing. To go back a level takes a
mean well below the limit, and after each relapse twice the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

LEVELS = 5
SIGMAS = 2.5
FEWEST_TOKENS = 4
ENOUGH_TOKENS = 400
MEMORY_TOKENS = 2000.0
"""Older evidence fades: about so many tokens count."""
FEWEST_COUNTED = 4
"""Counted steps before the kept mass is believed."""
MASS_MEMORY = 32.0
COMFORT = 0.5
"""A tighter level is tried when the mean is below this share of the limit."""
FIRST_PATIENCE = 2000
"""Steps that a level must have held before a tighter one is tried …"""
LONGEST_PATIENCE = 256_000
"""… which doubles with each relapse up to this."""


class Verdict(Enum):
    """What became of the level."""

    STAYS = "stays"
    LOOSENED = "loosened"
    TIGHTENED = "tightened"


@dataclass
class Evidence:
    """What is known of one level."""

    tokens: float = 0.0
    kl: float = 0.0
    kl_squared: float = 0.0
    counted: float = 0.0
    kept: float = 0.0

    def add_divergence(self, tokens: float, kl: float, squared: float) -> None:
        """Some tokens' divergence: number, sum and sum of squares."""
        fade = max(0.0, 1.0 - tokens / MEMORY_TOKENS)
        self.tokens = fade * self.tokens + tokens
        self.kl = fade * self.kl + kl
        self.kl_squared = fade * self.kl_squared + squared

    def add_kept(self, share: float) -> None:
        """The share of the router's mass that a counted step kept."""
        fade = 1.0 - 1.0 / MASS_MEMORY
        self.counted = fade * self.counted + 1.0
        self.kept = fade * self.kept + share

    @property
    def mean_kl(self) -> float | None:
        """Nats a token; None before any was measured."""
        return self.kl / self.tokens if self.tokens else None

    @property
    def mean_kept(self) -> float | None:
        """Share of the mass; None before any was measured."""
        return self.kept / self.counted if self.counted else None

    def standard_error(self) -> float:
        """Of the mean divergence."""
        if self.tokens < 2:
            return float("inf")
        mean = self.kl / self.tokens
        variance = max(0.0, self.kl_squared / self.tokens - mean * mean) * self.tokens / (self.tokens - 1)
        return float((variance / self.tokens) ** 0.5)


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

    def observe(
        self, step: int, tokens: float = 0.0, kl: float = 0.0, squared: float = 0.0, kept: float | None = None
    ) -> Verdict:
        """Learn from a step that was looked at.

        Args:
            step: its number.
            tokens: tokens whose distributions were compared.
            kl: sum of their divergences, nats.
            squared: sum of the squares.
            kept: share of the router's mass that was kept; None if nothing was counted. Means nothing at the last
                level, where nothing is refused.

        """
        if tokens:
            self.evidence.add_divergence(tokens, kl, squared)
        if kept is not None and self.level < self.last:
            self.evidence.add_kept(kept)
        if self.level < self.last and self._exceeded():
            # Found wanting again soon after it was tried: the next try comes later.
            self.patience = min(2 * self.patience, LONGEST_PATIENCE) if self.loosened else self.patience
            self.loosened += 1
            return self._move(self.level + 1, step, Verdict.LOOSENED)
        if self.level > 0 and step - self.since >= self.patience and self._comfortable():
            return self._move(self.level - 1, step, Verdict.TIGHTENED)
        return Verdict.STAYS

    def _move(self, level: int, step: int, verdict: Verdict) -> Verdict:
        self.level, self.since, self.evidence = level, step, Evidence()
        return verdict

    def _exceeded(self) -> bool:
        found = self.evidence
        kept = found.mean_kept
        if kept is not None and found.counted >= FEWEST_COUNTED and kept < self.min_kept:
            return True
        mean = found.mean_kl
        if mean is None or found.tokens < FEWEST_TOKENS:
            return False
        doubt = SIGMAS * found.standard_error() if found.tokens < ENOUGH_TOKENS else 0.0
        return mean - doubt > self.max_kl

    def _comfortable(self) -> bool:
        found = self.evidence
        mean, kept = found.mean_kl, found.mean_kept
        if kept is not None and kept < self.min_kept + 0.5 * (1.0 - self.min_kept) * (self.min_kept > 0):
            return False
        return mean is not None and found.tokens >= 16 and mean + SIGMAS * found.standard_error() < self._comfort()

    def _comfort(self) -> float:
        # At the last level the next one itself is compared, elsewhere one that is looser than what will be tried.
        return self.max_kl if self.level == self.last else COMFORT * self.max_kl
