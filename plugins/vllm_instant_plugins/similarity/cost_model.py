"""Time as a linear function of counts, learned online: the service time of a request, the time of a step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

OUTLIER_FACTOR = 3.0
"""An observation counts at most this multiple of its prediction: a pause of the process or a compilation is not a
property of the counts."""
MIN_OBSERVATIONS = 20
"""Observations after which outliers are limited."""


class LinearCostModel:
    """Recursive least squares with exponential forgetting; coefficients are never negative.

    Minimises the sum of weight * (seconds - coefficients . counts)^2 over the observations, each weighted by
    ``memory`` to the power of its age. A Gaussian prior keeps the initial coefficients until enough is observed.

    Args:
        coefficients: initial seconds per unit of each count.
        confidence: weight of the initial coefficients, in observations.
        memory: factor by which an observation's weight decays with each further observation.

    """

    def __init__(self, coefficients: npt.ArrayLike, confidence: float = 3.0, memory: float = 0.99) -> None:
        self.coefficients: Array = np.array(coefficients, float)
        self.num_observations = 0
        self._memory = memory
        # The normal equations: gram @ coefficients = moment.
        self._gram: Array = np.eye(len(self.coefficients)) * confidence
        self._moment: Array = self._gram @ self.coefficients

    def predict(self, *counts: float) -> float:
        """Predicted seconds."""
        return float(np.dot(self.coefficients, counts))

    def observe(self, seconds: float, *counts: float) -> None:
        """Learn from one measured time."""
        predicted = self.predict(*counts)
        if self.num_observations > MIN_OBSERVATIONS:
            seconds = min(seconds, OUTLIER_FACTOR * predicted)
        row = np.array(counts, float)
        # Relative errors: a long time is as informative about the coefficients as a short one.
        weight = 1 / max(predicted, 1e-4) ** 2
        self._gram *= self._memory
        self._moment *= self._memory
        if not self.num_observations:
            # The prior is given in observations: scale it to the size of the first one.
            scale = np.maximum(row, 1) ** 2 * weight
            self._gram *= scale[:, None]
            self._moment = self._gram @ self.coefficients
        self._gram += weight * np.outer(row, row)
        self._moment += weight * row * seconds
        self.num_observations += 1
        self._solve()

    def _solve(self) -> None:
        """Non-negative least squares by an active set: negative coefficients are set to 0 and the rest solved again."""
        solution: Array = np.asarray(np.linalg.solve(self._gram, self._moment))
        while (solution < 0).any():
            positive = solution > 0
            solution = np.zeros(len(solution))
            if not positive.any():
                break
            solution[positive] = np.linalg.solve(self._gram[np.ix_(positive, positive)], self._moment[positive])
        if solution.any():
            self.coefficients = solution
