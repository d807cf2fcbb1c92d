"""Limits on what one client can make the server do: memory that it occupies and text that it has tokenized."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

RENDERED_CHARACTERS_PER_SECOND = 500_000
"""Characters per second and client that are tokenized on average: far more than typing needs, with long prompts too."""
RENDERED_CHARACTERS_BURST = 4_000_000
"""Characters that a client may have tokenized at once."""


class ByteBudget:
    """The memory of all sessions, by client.

    Args:
        max_client_bytes: Maximum number of bytes of one client's sessions.
        max_total_bytes: Maximum number of bytes of all sessions.

    """

    def __init__(self, max_client_bytes: int, max_total_bytes: int) -> None:
        self._max_client_bytes = max_client_bytes
        self._max_total_bytes = max_total_bytes
        self._of_client: Counter[str] = Counter()
        self._total = 0

    def resize(self, client: str, before: int, after: int) -> str | None:
        """A session's memory grows or shrinks; returns why it cannot grow, or None if it is counted."""
        more = after - before
        if more > 0 and self._of_client[client] + more > self._max_client_bytes:
            return f"this client's limit of {self._max_client_bytes} bytes in sessions is reached"
        if more > 0 and self._total + more > self._max_total_bytes:
            return f"the server's limit of {self._max_total_bytes} bytes in sessions is reached"
        self._of_client[client] += more
        self._total += more
        if not self._of_client[client]:
            del self._of_client[client]
        return None


class RenderingBudget:
    """How much text each client has tokenized: a token bucket (RFC 2697) that may be overdrawn.

    An edit of a few bytes at the beginning of a long text has all of it tokenized again.

    Args:
        clock: Monotonic time in seconds.

    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # What a client has drawn, and when; an entry whose bucket is full again is dropped.
        self._drawn: dict[str, tuple[float, float]] = {}

    def draw(self, client: str, characters: int) -> float:
        """Count characters; returns the seconds to wait before they are tokenized."""
        now = self._clock()
        if len(self._drawn) > 1024:
            self._drawn = {name: entry for name, entry in self._drawn.items() if self._left(*entry, now) > 0}
        drawn = self._left(*self._drawn.get(client, (0.0, now)), now) + characters
        self._drawn[client] = (drawn, now)
        return max(0.0, drawn - RENDERED_CHARACTERS_BURST) / RENDERED_CHARACTERS_PER_SECOND

    @staticmethod
    def _left(drawn: float, since: float, now: float) -> float:
        return max(0.0, drawn - (now - since) * RENDERED_CHARACTERS_PER_SECOND)

    async def spend(self, client: str, characters: int) -> None:
        """Count characters and wait until they may be tokenized."""
        seconds = self.draw(client, characters)
        if seconds > 0:
            await asyncio.sleep(seconds)
