"""The value of the draft model's tokens during a lookup's miss streak.

Costs are in tokens at the average speed. Text has stretches that a lookup predicts, many tokens per step, and stretches
that it does not predict, one token per step (a miss streak). During a miss streak the first accepted draft token saves
a whole step, which is worth several average tokens, and each further one saves another step if the streak would have
continued; otherwise the lookup would have supplied that token for little more than the cost of its row. With ``p`` the
probability that a streak continues, a token at position ``j`` is worth ``row + (step - row) * p ** j``. ``p`` is
learned for each request and for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_instant import DraftCost, DraftRequest

Array = npt.NDArray[np.float64]

MIN_GAIN = 0.5
"""A lookup that is expected to gain fewer tokens than this is a miss."""
MEMORY = 0.99
REQUEST_MEMORY = 0.95
PRIOR_STEPS = 8.0
INITIAL_CONTINUATION = 0.8
MAX_STEPS = 50.0


class LookupMissStreaks:
    """Stretches in which lookups find nothing that is worth its cost, by request."""

    def __init__(self) -> None:
        self._continued, self._misses = INITIAL_CONTINUATION * PRIOR_STEPS, PRIOR_STEPS
        """Misses that were followed by another one, and all misses; of all requests, older ones fade."""
        self._by_request: dict[str, tuple[float, float]] = {}
        """The same by request."""
        self._missed: set[str] = set()
        """Requests whose last lookup was a miss."""

    def values(
        self, requests: Sequence[DraftRequest], gain: Array, draft_cost: DraftCost, positions: int
    ) -> tuple[Array, Array]:
        """Value of an accepted token at each draft position, in average tokens, and how long it holds.

        Args:
            requests: all requests that may get drafts.
            gain: expected gain of each one's lookup, ``[requests]``.
            draft_cost: costs of this step.
            positions: draft positions.

        Returns:
            Values ``[requests, positions]``, and the expected length of each miss streak in steps, this one included,
            ``[requests]``; 1 where the lookup is no miss.

        """
        values, steps = np.ones((len(requests), positions)), np.ones(len(requests))
        further = np.arange(positions)
        for row, request in enumerate(requests):
            is_miss = bool(gain[row] < MIN_GAIN)
            continuation = self._learn(request.request_id, is_miss)
            if is_miss:
                # Mean of a geometric distribution.
                steps[row] = min(1.0 / (1.0 - continuation), MAX_STEPS) if continuation < 1.0 else MAX_STEPS
            if is_miss and draft_cost.baseline_step > 0 and not request.is_fixed:
                saved = max(0.0, draft_cost.baseline_step - draft_cost.per_token)
                values[row] = draft_cost.per_token + saved * continuation**further
        return values, steps

    def _learn(self, request_id: str, is_miss: bool) -> float:
        """Probability that a miss is followed by another one."""
        continued, misses = self._by_request.get(request_id, (0.0, 0.0))
        if request_id in self._missed:
            continued, misses = REQUEST_MEMORY * continued + is_miss, REQUEST_MEMORY * misses + 1.0
            self._continued, self._misses = MEMORY * self._continued + is_miss, MEMORY * self._misses + 1.0
            self._by_request[request_id] = (continued, misses)
        if is_miss:
            self._missed.add(request_id)
        else:
            self._missed.discard(request_id)
        return (continued + PRIOR_STEPS * self._continued / self._misses) / (misses + PRIOR_STEPS)

    def forget(self, request_id: str) -> None:
        """Drop what was learned about a request that has ended."""
        self._by_request.pop(request_id, None)
        self._missed.discard(request_id)
