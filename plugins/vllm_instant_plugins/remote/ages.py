"""The confidence of drafts from elsewhere, learned by their age and by the probability that their drafter states.

The age of a draft token is the number of tokens between the newest one that its drafter knew and itself: how far ahead
of the verified text it was drafted.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_instant.remote.protocol import MAX_AHEAD
from vllm_instant_plugins.remote.branches import PROBABILITIES

PRIOR = 0.7
"""Confidence of the first draft token of a drafter that states none: high, so that it is tried."""
PRIOR_WEIGHT = 8.0
MEMORY = 0.998
AGES = 8
"""Number of classes of ages: 0, 1, 2 to 3, 4 to 7, and so on."""
REQUEST_WEIGHT = 6.0
"""Weight of the assumption that a request is like the others, in expected hits."""
REQUEST_MEMORY = 0.95


_CELLS = PROBABILITIES + 1
_FIRST_CELL = [min(age.bit_length(), AGES - 1) * _CELLS for age in range(2 * MAX_AHEAD)]
"""The first cell of each age's class; older ones have that of the last."""


class AgeCalibrator:
    """Rate at which draft tokens are right, given that those before them in the draft are, by age and probability."""

    def __init__(self) -> None:
        cells = AGES * _CELLS
        self._hits = [0.0] * cells
        self._trials = [0.0] * cells
        middles = [(number + 0.5) / PROBABILITIES for number in range(PROBABILITIES)]
        self._prior = [*middles, PRIOR] * AGES
        self.rates = list(self._prior)
        """By cell."""

    def cells(self, ages: Sequence[int], probabilities: Sequence[int]) -> list[int]:
        """Return the cell of each draft token, by its age and the class of its probability."""
        first = _FIRST_CELL
        if max(ages) >= len(first):
            ages = [min(age, len(first) - 1) for age in ages]
        return [first[age] + probability for age, probability in zip(ages, probabilities, strict=True)]

    def observe(self, cells: Sequence[int], num_accepted: int) -> None:
        """Learn from compared tokens in these cells, of which the first ``num_accepted`` were right."""
        hits, trials, rates, prior = self._hits, self._trials, self.rates, self._prior
        for place, cell in enumerate(cells):
            trials[cell] = trials[cell] * MEMORY + 1.0
            hits[cell] = hits[cell] * MEMORY + (1.0 if place < num_accepted else 0.0)
            rates[cell] = (hits[cell] + PRIOR_WEIGHT * prior[cell]) / (trials[cell] + PRIOR_WEIGHT)


class RequestRecord:
    """Right tokens of one request per expected one."""

    def __init__(self) -> None:
        self._expected = self._accepted = REQUEST_WEIGHT

    @property
    def factor(self) -> float:
        """Factor of the confidences of this request's drafts."""
        return self._accepted / self._expected

    def observe(self, expected: float, num_accepted: int) -> None:
        """Learn from a compared draft of which ``expected`` tokens were expected to be right."""
        prior = (1.0 - REQUEST_MEMORY) * REQUEST_WEIGHT
        self._expected = REQUEST_MEMORY * self._expected + prior + expected
        self._accepted = REQUEST_MEMORY * self._accepted + prior + num_accepted
