"""What things take on this server: a request's whole service, and one step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class LinearTime:
    """Seconds as a sum of prices times counts, learned online by least squares with exponential forgetting.

    Prices never fall below zero. Outliers (a pause of the process, a compilation) count no more than three times what
    was expected.

    Args:
        prices: what is believed before anything was measured, in seconds a unit of each count.
        confidence: how many measurements that belief is worth.
        memory: what a measurement keeps of its weight when another one comes.

    """

    def __init__(self, prices: npt.ArrayLike, confidence: float = 3.0, memory: float = 0.99) -> None:
        self.prices: Array = np.array(prices, float)
        self.measured = 0
        self._memory = memory
        self._gram: Array = np.eye(len(self.prices)) * confidence
        self._moment: Array = self._gram @ self.prices

    def expected(self, *counts: float) -> float:
        """Seconds for so many of each."""
        return float(np.dot(self.prices, counts))

    def observe(self, seconds: float, *counts: float) -> None:
        """It took so long."""
        expected = self.expected(*counts)
        if self.measured > 20:
            seconds = min(seconds, 3 * expected)
        row = np.array(counts, float)
        # Relative errors: a long service says no more about the prices than a short one.
        weight = 1 / max(expected, 1e-4) ** 2
        self._gram *= self._memory
        self._moment *= self._memory
        if not self.measured:
            # The belief is worth some measurements of this size.
            size = np.maximum(row, 1) ** 2 * weight
            self._gram *= size[:, None]
            self._moment = self._gram @ self.prices
        self._gram += weight * np.outer(row, row)
        self._moment += weight * row * seconds
        self.measured += 1
        prices: Array = np.asarray(np.linalg.solve(self._gram, self._moment))
        while (prices < 0).any():
            free = prices > 0
            prices = np.zeros(len(row))
            if not free.any():
                break
            prices[free] = np.linalg.solve(self._gram[np.ix_(free, free)], self._moment[free])
        if prices.any():
            self.prices = prices
