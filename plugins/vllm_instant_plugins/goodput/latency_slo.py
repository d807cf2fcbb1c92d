"""Latency goals: requests that are ahead of their goal give draft tokens to requests that are behind."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vllm_instant import UpcomingStep

Array = npt.NDArray[np.float64]

MAX_WEIGHT = 4.0
"""Limit of the weight of a token, relative to a request at its goal; requests ahead of it have at least the inverse."""


class LatencySlo:
    """Turns latency goals into weights of each request's tokens, and into a limit on a step's time.

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
        """Forget what was known of the request that had this index before."""
        if index >= len(self._tokens):
            more = max(index + 1, 2 * len(self._tokens)) - len(self._tokens)
            self._first, self._newest, self._tokens = (
                np.pad(array, (0, more)) for array in (self._first, self._newest, self._tokens)
            )
        self._tokens[index] = 0

    def observe(self, indices: npt.NDArray[np.intp], produced: npt.NDArray[np.int_]) -> None:
        """Record the new tokens of these requests."""
        now = self._clock()
        new = self._tokens[indices] == 0
        # The time between tokens is measured from the first step with output; how many tokens that had does not count.
        self._first[indices[new]] = now
        self._tokens[indices] += np.where(new, 1, produced)
        self._newest[indices] = now

    def weights(self, indices: npt.NDArray[np.intp]) -> Array | None:
        """Weight of a token of each request, 1 at its goal; None without a goal for the time between tokens."""
        if self.itl_seconds is None:
            return None
        gaps = self._tokens[indices] - 1
        mean = np.where(gaps > 0, (self._newest[indices] - self._first[indices]) / np.maximum(gaps, 1), 0.0)
        urgency = np.where(gaps > 0, mean / self.itl_seconds, 1.0)
        return np.clip(urgency, 1 / MAX_WEIGHT, MAX_WEIGHT)

    def max_seconds(self, step: UpcomingStep) -> float:
        """Seconds of the longest step that still meets the goals, if one without drafts meets them.

        A request without drafts gets one token per step, so that a step must not be longer than the goal for the time
        between tokens; and while a request waits for its first token, not longer than the rest of the goal for that.
        """
        max_seconds = np.inf
        if self.itl_seconds is not None:
            max_seconds = self.itl_seconds
        if self.ttft_seconds is not None and step.num_waiting:
            max_seconds = min(max_seconds, max(0.0, self.ttft_seconds - step.max_wait))
        return max_seconds
