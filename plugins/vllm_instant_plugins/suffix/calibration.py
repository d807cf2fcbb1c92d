"""How much a match is worth: learned by comparing what was proposed with what then came."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.suffix.index import MAX_MATCH, Match, Tokens

PRIOR_MATCH = 2.0
"""Before anything was seen a match of n tokens is trusted n / (n + this)."""
PRIOR_WEIGHT = 8.0
FORGETTING = 0.998
LEARNED_LENGTHS = MAX_MATCH + 129
REQUEST_WEIGHT = 6.0
"""Expected hits that the belief that a request is like the others is worth."""
REQUEST_FORGETTING = 0.95


def count_accepted(proposed: Tokens, came: Tokens) -> tuple[int, int]:
    """How many of the proposed tokens were compared with one that came, and how many of these came true."""
    compared = min(len(proposed), len(came))
    same = proposed[:compared] == came[:compared]
    kept = compared if same.all() else int(same.argmin())
    return kept + (kept < compared), kept


class ConfidenceCalibrator:
    """How often the token after a match came true, by the match's length."""

    def __init__(self) -> None:
        length = np.arange(LEARNED_LENGTHS)
        self._prior = length / (length + PRIOR_MATCH)
        self._hits = np.zeros(LEARNED_LENGTHS)
        self._trials = np.zeros(LEARNED_LENGTHS)
        self.rates: npt.NDArray[np.float64] = self._prior.copy()

    def observe(self, matched: npt.NDArray[np.int64], kept: int) -> None:
        """Tokens were compared that followed matches of these lengths; the first ``kept`` came true."""
        at = np.minimum(matched, LEARNED_LENGTHS - 1)
        self._trials[at] = self._trials[at] * FORGETTING + 1
        self._hits[at] *= FORGETTING
        self._hits[at[:kept]] += 1
        self.rates[at] = (self._hits[at] + PRIOR_WEIGHT * self._prior[at]) / (self._trials[at] + PRIOR_WEIGHT)


class RequestCalibration:
    """How much more or less often than others one request continues as it did before."""

    def __init__(self) -> None:
        self._expected = self._came = REQUEST_WEIGHT

    @property
    def factor(self) -> float:
        """What its confidences are multiplied with."""
        return self._came / self._expected

    def observe(self, found: Match, compared: int, kept: int) -> None:
        """Of a proposal, with confidence as for any request, so many tokens were compared and came true."""
        rest = 1.0 - REQUEST_FORGETTING
        # Beliefs about later tokens were conditional on the earlier ones.
        expected = float(found.confidence[:compared].sum())
        self._expected = REQUEST_FORGETTING * self._expected + rest * REQUEST_WEIGHT + expected
        self._came = REQUEST_FORGETTING * self._came + rest * REQUEST_WEIGHT + kept
