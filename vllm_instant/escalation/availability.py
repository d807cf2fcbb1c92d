"""Whether the deep server may be asked: after some failures in a row it is left alone for a while."""

from __future__ import annotations

from collections.abc import Callable


class Availability:
    """A circuit breaker for a server. One request at a time tries a server that was left alone.

    Args:
        max_failures: Failures in a row after which it is left alone.
        retry_seconds: Seconds until it is tried again.
        clock: Time in seconds.

    """

    def __init__(self, max_failures: int, retry_seconds: float, clock: Callable[[], float]) -> None:
        self._max_failures = max_failures
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._num_failures = 0
        self._closed_until: float | None = None

    @property
    def is_down(self) -> bool:
        """Whether the server is left alone."""
        return self._closed_until is not None

    def admits(self) -> bool:
        """Whether a request may be sent now; its outcome is then reported, unless the client left."""
        if self._closed_until is None:
            return True
        now = self._clock()
        if now < self._closed_until:
            return False
        # This request tries the server; the next one waits as long again unless it reports success.
        self._closed_until = now + self._retry_seconds
        return True

    def succeeded(self) -> None:
        self._num_failures = 0
        self._closed_until = None

    def failed(self) -> None:
        self._num_failures += 1
        if self._num_failures >= self._max_failures:
            self._closed_until = self._clock() + self._retry_seconds
