"""Latency goals: requests that are ahead of their goal give draft tokens to those that are behind."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vllm_instant import UpcomingStep

Array = npt.NDArray[np.float64]

STRONGEST = 4.0
"""A token of a request far behind its goal is worth so many times one of a request at its goal; inversely ahead."""


class LatencyGoals:
    """Turns goals into what a token of each request is worth, and into a longest step.

    Args:
        itl_seconds: goal for the mean time between tokens of a request, from its first to its newest.
        ttft_seconds: goal for the time from arrival to the first token.
        clock: seconds, monotonic.

    """

    def __init__(
        self,
        itl_seconds: float | None = None,
        ttft_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.itl_seconds = itl_seconds
        self.ttft_seconds = ttft_seconds
        self._clock = clock
        self._first: Array = np.zeros(64)
        self._newest: Array = np.zeros(64)
        self._tokens: Array = np.zeros(64)

    def enter(self, index: int) -> None:
        """A request took ``index``."""
        if index >= len(self._tokens):
            more = max(index + 1, 2 * len(self._tokens)) - len(self._tokens)
            self._first, self._newest, self._tokens = (
                np.pad(array, (0, more)) for array in (self._first, self._newest, self._tokens)
            )
        self._tokens[index] = 0

    def observe(self, indices: npt.NDArray[np.intp], produced: npt.NDArray[np.int_]) -> None:
        """These requests got so many tokens just now."""
        now = self._clock()
        new = self._tokens[indices] == 0
        # The clock of the time between tokens starts with the first ones.
        self._first[indices[new]] = now
        self._tokens[indices] += np.where(new, 1, produced)
        self._newest[indices] = now

    def weights(self, indices: npt.NDArray[np.intp]) -> Array | None:
        """What a token of each request is worth, 1 at its goal; None without a goal for the time between tokens."""
        if self.itl_seconds is None:
            return None
        gaps = self._tokens[indices] - 1
        mean = np.where(gaps > 0, (self._newest[indices] - self._first[indices]) / np.maximum(gaps, 1), 0.0)
        urgency = np.where(gaps > 0, mean / self.itl_seconds, 1.0)
        return np.clip(urgency, 1 / STRONGEST, STRONGEST)

    def max_seconds(self, step: UpcomingStep) -> float:
        """The longest step that still keeps the goals, if one without drafts keeps them.

        A request without drafts gets one token a step, so that a step must not be longer than the goal for the time
        between tokens; and while somebody waits for a first token, not longer than what is left for that.
        """
        most = np.inf
        if self.itl_seconds is not None:
            most = self.itl_seconds
        if self.ttft_seconds is not None and step.num_waiting:
            most = min(most, max(0.0, self.ttft_seconds - step.max_wait))
        return most
