"""Confidence of lookup drafts, learned by comparing drafts with the tokens that were then sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.jit import compiled
from vllm_instant_plugins.suffix.vote import KINDS, SHORTEST, SOURCES

PRIOR_HITS, PRIOR_MATCH = 0.5, 2.0
PRIORS = (0.6, 0.8, 1.0, 0.75, 0.5, 0.25)
"""The prior confidence after a match of n tokens is (n - PRIOR_HITS) / (n + PRIOR_MATCH), times this for each class of
agreement. It may be low: drafts that are not verified are compared with what comes as well."""
PRIOR_WEIGHT = 5.0
MEMORY = 0.99
REQUEST_WEIGHT = 40.0
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
    """Rates at which draft tokens of each kind are right: beta-Bernoulli with exponential forgetting."""

    def __init__(self) -> None:
        length = np.array(SHORTEST)
        prior = np.outer(PRIORS, (length - PRIOR_HITS) / (length + PRIOR_MATCH))
        self.table: npt.NDArray[np.float64] = np.zeros((4, KINDS))
        """float64 ``[4, KINDS]``: rates, prior rates, and the hits and trials that are remembered."""
        self.table[:2] = np.tile(prior.ravel(), SOURCES)

    @property
    def rates(self) -> npt.NDArray[np.float64]:
        """float64 ``[KINDS]``."""
        rates: npt.NDArray[np.float64] = self.table[0]
        return rates


def new_request_weights() -> npt.NDArray[np.float64]:
    """What ``learn`` knows of a new request: float64 ``[2]``, expected and accepted tokens, remembered."""
    return np.full(2, REQUEST_WEIGHT)


@compiled
def learn(kinds: Any, confidence: Any, num_compared: int, num_accepted: int, table: Any, request_weights: Any) -> None:
    """Learn from a draft's first ``num_compared`` tokens, of which ``num_accepted`` were right.

    Args:
        kinds: int64 ``[any]``, of each draft token.
        confidence: float64 ``[any]``: the rate of each, given that those before it are right.
        num_compared: see above; at most one more than ``num_accepted``.
        num_accepted: see above.
        table: ``ConfidenceCalibrator.table``.
        request_weights: float64 ``[2]``; the second one by the first one is the factor of the request's confidences.

    """
    expected = 0.0
    for position in range(num_compared):
        kind = kinds[position]
        hits = table[2, kind] * MEMORY + (1.0 if position < num_accepted else 0.0)
        trials = table[3, kind] * MEMORY + 1.0
        table[0, kind] = (hits + PRIOR_WEIGHT * table[1, kind]) / (trials + PRIOR_WEIGHT)
        table[2, kind], table[3, kind] = hits, trials
        expected += confidence[position]
    prior = (1.0 - REQUEST_MEMORY) * REQUEST_WEIGHT
    request_weights[0] = REQUEST_MEMORY * request_weights[0] + prior + expected
    request_weights[1] = REQUEST_MEMORY * request_weights[1] + prior + num_accepted
