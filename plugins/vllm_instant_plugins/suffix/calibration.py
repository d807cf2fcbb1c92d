"""Confidence of lookup drafts, learned by comparing drafts with the tokens that were then sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.jit import compiled
from vllm_instant_plugins.suffix.index import MAX_MATCH, Match

PRIOR_MATCH = 2.0
"""The prior confidence of a match of n tokens is n / (n + PRIOR_MATCH)."""
PRIOR_WEIGHT = 8.0
MEMORY = 0.998
LEARNED_LENGTHS = MAX_MATCH + 129
REQUEST_WEIGHT = 6.0
"""Weight of the assumption that a request is like the others, in expected hits."""
REQUEST_MEMORY = 0.95


def count_accepted(draft: Sequence[int], sampled: Sequence[int]) -> tuple[int, int]:
    """The numbers of draft tokens that were compared with sampled ones, and that were right before any error."""
    accepted = 0
    for token, expected in zip(draft, sampled, strict=False):
        if token != expected:
            return accepted + 1, accepted
        accepted += 1
    return accepted, accepted


class ConfidenceCalibrator:
    """Rate at which the token after a match is right, by the match's length."""

    def __init__(self) -> None:
        length = np.arange(LEARNED_LENGTHS)
        self._prior = length / (length + PRIOR_MATCH)
        self._hits = np.zeros(LEARNED_LENGTHS)
        self._trials = np.zeros(LEARNED_LENGTHS)
        self.rates: npt.NDArray[np.float64] = self._prior.copy()

    def observe(self, matched: npt.NDArray[np.int64], num_accepted: int) -> None:
        """Learn from compared tokens that followed matches of these lengths; the first ``num_accepted`` were right."""
        learn_rates(matched, num_accepted, self._prior, self._hits, self._trials, self.rates)


@compiled
def learn_rates(matched: Any, num_accepted: int, prior: Any, hits: Any, trials: Any, rates: Any) -> None:
    """``ConfidenceCalibrator.observe``: beta-Bernoulli rates with exponential forgetting, by length of the match."""
    for position in range(len(matched)):
        at = min(matched[position], len(rates) - 1)
        trials[at] = trials[at] * MEMORY + 1.0
        hits[at] = hits[at] * MEMORY + (1.0 if position < num_accepted else 0.0)
        rates[at] = (hits[at] + PRIOR_WEIGHT * prior[at]) / (trials[at] + PRIOR_WEIGHT)


class RequestCalibration:
    """Accepted tokens of one request per expected one."""

    def __init__(self) -> None:
        self._expected = self._accepted = REQUEST_WEIGHT

    @property
    def factor(self) -> float:
        """The factor of the request's confidences."""
        return self._accepted / self._expected

    def observe(self, match: Match, num_compared: int, num_accepted: int) -> None:
        """Learn from a draft whose ``match`` has the confidence of any request."""
        prior = (1.0 - REQUEST_MEMORY) * REQUEST_WEIGHT
        # Confidences are conditional on the earlier tokens being right, as comparison is.
        expected = float(match.confidence[:num_compared].sum())
        self._expected = REQUEST_MEMORY * self._expected + prior + expected
        self._accepted = REQUEST_MEMORY * self._accepted + prior + num_accepted
