"""What the draft model's tokens are worth while the lookup is silent.

Prices are in tokens that the time would bring on average. Text has stretches that a lookup foresees, many tokens a
step, and stretches that it does not, one token a step. There the first draft token that is accepted saves a whole step,
which is worth several average tokens, and each further one saves another step if the lookup would have gone on being
silent; otherwise it would have given that token for little more than the price of its row. How long lookups stay
silent is learned, for each request and for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_instant import DraftCost, DraftRequest

Array = npt.NDArray[np.float64]

MIN_GAIN = 0.5
"""A lookup that is expected to gain fewer tokens than this says next to nothing."""
MEMORY = 0.99
REQUEST_MEMORY = 0.95
PRIOR_STEPS = 8.0
FIRST_LASTING = 0.8
MAX_STEPS = 50.0


class LookupMissStreaks:
    """Stretches in which lookups find nothing worth while, by request."""

    def __init__(self) -> None:
        self._lasted, self._steps = FIRST_LASTING * PRIOR_STEPS, PRIOR_STEPS
        """Silent steps after which the next one was silent, too, and all silent steps; of all requests, fading."""
        self._of: dict[str, tuple[float, float]] = {}
        """The same by request."""
        self._silent: set[str] = set()
        """Requests whose lookup was silent when they were asked about last."""

    def values(
        self, requests: Sequence[DraftRequest], gain: Array, draft_cost: DraftCost, positions: int
    ) -> tuple[Array, Array]:
        """What a token at each draft position is worth if it is accepted, in average tokens, and how long that holds.

        Args:
            requests: all that may get drafts.
            gain: what each one's lookup is expected to gain, ``[requests]``.
            draft_cost: of this step.
            positions: draft positions.

        Returns:
            ``[requests, positions]``, and for how many steps, this one included, each lookup is expected to be
            silent: ``[requests]``, 1 where it is not.

        """
        values, steps = np.ones((len(requests), positions)), np.ones(len(requests))
        further = np.arange(positions)
        for row, request in enumerate(requests):
            silent = gain[row] < MIN_GAIN
            lasting = self._learn(request.request_id, bool(silent))
            if silent:
                steps[row] = min(1.0 / (1.0 - lasting), MAX_STEPS) if lasting < 1.0 else MAX_STEPS
            if silent and draft_cost.baseline_step > 0 and not request.is_fixed:
                values[row] = (
                    draft_cost.per_token + max(0.0, draft_cost.baseline_step - draft_cost.per_token) * lasting**further
                )
        return values, steps

    def _learn(self, request_id: str, silent: bool) -> float:
        """Chance that the lookup is silent in the step after a silent one, too."""
        lasted, steps = self._of.get(request_id, (0.0, 0.0))
        if request_id in self._silent:
            lasted, steps = REQUEST_MEMORY * lasted + silent, REQUEST_MEMORY * steps + 1.0
            self._lasted, self._steps = MEMORY * self._lasted + silent, MEMORY * self._steps + 1.0
            self._of[request_id] = (lasted, steps)
        if silent:
            self._silent.add(request_id)
        else:
            self._silent.discard(request_id)
        return (lasted + PRIOR_STEPS * self._lasted / self._steps) / (steps + PRIOR_STEPS)

    def forget(self, request_id: str) -> None:
        """The request ended."""
        self._of.pop(request_id, None)
        self._silent.discard(request_id)
