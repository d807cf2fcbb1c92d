"""When to try what does not look best: little enough to cost nothing, often enough to notice a change.

Exploring spends an allowance, counted in steps: each step adds a fixed share, each exploration takes what it is
expected to lose. So the loss is bounded by that share whatever happens, cheap explorations come often and expensive
ones seldom. Only the question whether a drafter that is off has become better may overdraw it, once in
``MAX_SILENCE`` steps.
"""

from __future__ import annotations

ALLOWANCE_PER_STEP = 0.006
MAX_ALLOWANCE = 0.6
SHORTEST_SILENCE = 12
MAX_SILENCE = 40


class ExplorationBudget:
    """What exploration may still lose, in steps."""

    def __init__(self) -> None:
        self.left = 0.0
        self._silence: dict[str, int] = {}

    def step(self) -> None:
        """Another step was planned."""
        self.left = min(self.left + ALLOWANCE_PER_STEP, MAX_ALLOWANCE)
        for what in self._silence:
            self._silence[what] += 1

    def affords(self, what: str, loss: float) -> bool:
        """Whether ``take`` would say yes; nothing is paid."""
        return self._silence.get(what, SHORTEST_SILENCE) >= SHORTEST_SILENCE and self.left >= loss

    def may(self, what: str, saving: bool = False) -> bool:
        """Whether ``take`` that ``must`` would say yes to the smallest loss; nothing is paid."""
        silence = self._silence.setdefault(what, SHORTEST_SILENCE)
        return silence >= MAX_SILENCE or not (saving or silence < SHORTEST_SILENCE or self.left < 0.0)

    def due(self, what: str) -> bool:
        """Whether ``what`` was not explored for so long that it must be now."""
        return self._silence.get(what, SHORTEST_SILENCE) >= MAX_SILENCE

    def take(self, what: str, loss: float, must: bool = False, saving: bool = False) -> bool:
        """Whether to explore ``what`` now, at an expected loss of ``loss`` steps; if so, it is paid.

        Args:
            what: what is explored; each has a silence of its own.
            loss: in steps.
            must: not later than ``MAX_SILENCE`` steps after the last time, even if the allowance goes below zero.
            saving: not earlier either: the allowance is kept for something better.

        """
        silence = self._silence.setdefault(what, SHORTEST_SILENCE)
        due = must and self.due(what)
        if not due and (saving or silence < SHORTEST_SILENCE or self.left < loss):
            return False
        self.pay(what, loss)
        return True

    def pay(self, what: str, loss: float) -> None:
        """An exploration that is done in any case."""
        # A deeper debt would forbid every exploration for longer than anything stays as it was.
        self.left = max(self.left - max(0.0, loss), -MAX_ALLOWANCE)
        self._silence[what] = 0
