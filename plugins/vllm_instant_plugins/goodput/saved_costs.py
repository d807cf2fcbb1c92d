"""Saves the learned step times, so that the next start of the same deployment begins with them."""

from __future__ import annotations

from collections.abc import Callable

from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.state_store import PersistentState

SAVE_SECONDS = 60.0
SAVE_OBSERVATIONS = 200
FIRST_OBSERVATIONS = 20
"""Costs are first saved after this many observations, so that a server that is killed early leaves something, too."""


class SavedCosts:
    """Restores the costs at once, and saves them from time to time.

    Args:
        costs: what is saved.
        store: where.
        clock: seconds, monotonic.

    """

    def __init__(self, costs: StepCosts, store: PersistentState, clock: Callable[[], float]) -> None:
        self._costs = costs
        self._store = store
        self._clock = clock
        self._saved_at = clock()
        self._observations = 0
        """Observations in what was saved."""
        saved = store.load()
        if saved is not None:
            costs.restore(saved)

    def save_sometimes(self) -> None:
        """Save in the background if enough was learned since the last time."""
        now = self._clock()
        unsaved = self._costs.observations - self._observations
        due = unsaved >= SAVE_OBSERVATIONS and now - self._saved_at >= SAVE_SECONDS
        if due or (not self._observations and unsaved >= FIRST_OBSERVATIONS):
            self._saved_at, self._observations = now, self._costs.observations
            self._store.save_in_background(self._costs.state())

    def close(self) -> None:
        """Save what is not saved yet."""
        if self._costs.observations > self._observations:
            self._store.save(self._costs.state())
