"""How many distinct experts of a mixture-of-experts model a step uses, learned from the steps that were counted.

Tokens that chose their experts on their own would use ``N (1 - (1 - k / N) ** u)`` of a layer's ``N`` experts with
``k`` picks each, ``u`` tokens of them. Real tokens like some experts more, and the draft tokens of one request like
those of the token before them; so ``u`` is learned as a share of a request plus another share of a draft token, by
least squares with forgetting. Two numbers fit what was measured, need no history and hold for batches never seen.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant.interfaces.experts import ExpertCount

_MEMORY = 0.98
_PRIOR = 0.5
"""Weight of what is believed at first: that a draft token is as good as a request of its own."""


class ExpertUse:
    """Distinct experts as a share of all, by requests and draft tokens."""

    def __init__(self) -> None:
        self.counted = 0
        self._alone = 0.0
        """Share of the experts that one token picks."""
        self._of_request = self._of_draft = 1.0
        self._products = np.zeros((2, 2))
        self._targets = np.zeros(2)

    def observe(self, count: ExpertCount) -> None:
        """A step was counted."""
        alone = count.top_k / count.num_experts
        if count.requests < 1 or not 0.0 < alone < 1.0:
            return
        if alone != self._alone:
            self._alone, self.counted = alone, 0
            self._products, self._targets = _PRIOR * np.eye(2), np.full(2, _PRIOR)
        self.counted += 1
        # The last expert of a layer would take infinitely many tokens.
        used = min(count.experts, count.num_experts - 0.5) / count.num_experts
        tokens = math.log1p(-used) / math.log1p(-alone)
        x = np.array([count.requests, count.draft_tokens], float)
        # Errors relative to what is used: large batches must not drown small ones, and where hardly an expert is left
        # over, how many tokens it took can hardly be told.
        weight = ((1.0 - used) / used) ** 2
        self._products = _MEMORY * self._products + weight * np.outer(x, x)
        self._targets = _MEMORY * self._targets + weight * tokens * x
        # What forgetting leaves of a direction that is not measured any more stays solvable.
        solved = np.linalg.solve(self._products + 1e-6 * np.eye(2), self._targets + 1e-6)
        self._of_request, self._of_draft = np.clip(solved, 0.02, 1.5).tolist()

    def share(self, requests: npt.NDArray[np.float64] | float, drafts: npt.NDArray[np.float64] | float) -> Any:
        """The share of a layer's experts that a step uses; 0 while nothing was counted. Shape of ``drafts``."""
        if not self.counted:
            return 0.0 * np.asarray(drafts, float)
        tokens = self._of_request * np.asarray(requests, float) + self._of_draft * np.asarray(drafts, float)
        return -np.expm1(tokens * math.log1p(-self._alone))
