"""What a load test has to reach, as the table ``[goals]`` of a scenario; a goal that is not given is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Milliseconds = Annotated[float | None, Field(gt=0)]


class LoadTestGoals(BaseModel):
    """Upper bounds, and one lower bound (``tokens_per_second``); each must hold for every server of the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_p50_ms: Milliseconds = None
    ttft_p99_ms: Milliseconds = None
    """Time to first token, counted from when the request was due."""
    itl_p50_ms: Milliseconds = None
    itl_p99_ms: Milliseconds = None
    """Inter-token latency, one entry a token."""
    e2e_p50_ms: Milliseconds = None
    e2e_p99_ms: Milliseconds = None
    """From due to the last token."""
    stall_p99_ms: Milliseconds = None
    """Longest time without a token of each request."""
    error_rate: Annotated[float | None, Field(ge=0, le=1)] = None
    """Share of requests that failed; those whose client hung up on purpose do not count."""
    spikes: Annotated[int | None, Field(ge=0)] = None
    """How many may be found."""
    tokens_per_second: Annotated[float | None, Field(gt=0)] = None
    """Output tokens a second of all streams together, at least."""

    def given(self) -> dict[str, float]:
        """Those that were set, by name."""
        return {name: float(value) for name, value in self.model_dump().items() if value is not None}


@dataclass(frozen=True)
class GoalResult:
    """One goal of one server."""

    server: str
    goal: str
    limit: float
    found: float | None
    """None where the run has too little data."""
    met: bool

    @property
    def sentence(self) -> str:
        """For people."""
        found = "not measured: too little data" if self.found is None else f"{self.found:.4g}"
        relation = "at least" if self.goal == "tokens_per_second" else "at most"
        return f"{self.server}: {self.goal} is {found}, should be {relation} {self.limit:.4g}"


def check_goals(goals: LoadTestGoals, server: str, found: dict[str, float | None]) -> Iterator[GoalResult]:
    """Every goal that was given beside what the server did; what was not measured is not met."""
    for goal, limit in goals.given().items():
        value = found.get(goal)
        reached = value is not None and (value >= limit if goal == "tokens_per_second" else value <= limit)
        yield GoalResult(server, goal, limit, value, reached)
