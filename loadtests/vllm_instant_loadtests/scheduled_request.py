"""One request of a scenario, as it is planned."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ScheduledRequest:
    """One request of a scenario; all servers get the same ones."""

    number: int
    at: float
    """Second of the timeline at which it is due; a typist starts typing then."""
    kind: str
    route: str
    body: dict[str, Any]
    """The request body without ``model``. A typist's text is the content of the last message."""
    leave_after: int | None = None
    """Number of tokens after which the client hangs up."""
    characters_per_second: float | None = None
    """Typing speed of a typist."""
    session: int | None = None
    """Number of its session; None for a request of its own."""
    turn: int = 0
    """Its place in the session, from 0."""
    after: list[int] = field(default_factory=list)
    """Numbers of requests of the session whose answers it waits for; ``at`` is then the session's beginning."""
    pause: float = 0.0
    """Seconds between the last of these answers and this request: the user thinks, or a tool runs."""

    @property
    def typing_seconds(self) -> float:
        """Duration of typing; latencies count from its end."""
        if self.characters_per_second is None:
            return 0.0
        return len(self.body["messages"][-1]["content"]) / self.characters_per_second

    def plain(self) -> dict[str, Any]:
        """The request as JSON types."""
        return asdict(self)
