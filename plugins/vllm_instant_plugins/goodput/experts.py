"""The number of distinct experts of a mixture-of-experts model that a step uses, learned from counted steps.

``u`` tokens that chose their experts independently would use ``N (1 - (1 - k / N) ** u)`` of a layer's ``N`` experts
with ``k`` picks each. Real tokens prefer some experts, and the draft tokens of one request prefer the experts of the
token before them; so the effective ``u = a * requests + b * draft_tokens`` is fitted by least squares with forgetting.
Two numbers fit the measurements, need no history and extrapolate to other batches.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant.interfaces.experts import ExpertCount

_MEMORY = 0.98
_PRIOR = 0.5
"""Weight of the initial assumption that a draft token uses as many new experts as a request."""


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
        """Learn from a counted step."""
        alone = count.top_k / count.num_experts
        if count.requests < 1 or not 0.0 < alone < 1.0:
            return
        if alone != self._alone:
            self._alone, self.counted = alone, 0
            self._products, self._targets = _PRIOR * np.eye(2), np.full(2, _PRIOR)
        self.counted += 1
        # Solved for u: u = log(1 - used) / log(1 - k / N). The last expert of a layer would take infinitely many
        # tokens.
        used = min(count.experts, count.num_experts - 0.5) / count.num_experts
        tokens = math.log1p(-used) / math.log1p(-alone)
        x = np.array([count.requests, count.draft_tokens], float)
        # Relative errors of the share used: large batches must not outweigh small ones, and where almost all experts
        # are used, u is almost undetermined.
        weight = ((1.0 - used) / used) ** 2
        self._products = _MEMORY * self._products + weight * np.outer(x, x)
        self._targets = _MEMORY * self._targets + weight * tokens * x
        # The ridge keeps the system solvable where a direction has not been measured for long.
        solved = np.linalg.solve(self._products + 1e-6 * np.eye(2), self._targets + 1e-6)
        self._of_request, self._of_draft = np.clip(solved, 0.02, 1.5).tolist()

    def share(self, requests: npt.NDArray[np.float64] | float, drafts: npt.NDArray[np.float64] | float) -> Any:
        """The share of a layer's experts that a step uses; 0 while nothing was counted. Shape of ``drafts``."""
        if not self.counted:
            return 0.0 * np.asarray(drafts, float)
        tokens = self._of_request * np.asarray(requests, float) + self._of_draft * np.asarray(drafts, float)
        return -np.expm1(tokens * math.log1p(-self._alone))
