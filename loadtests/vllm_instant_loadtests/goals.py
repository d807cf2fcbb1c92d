"""The goals of a load test: the table ``[goals]`` of a scenario."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Milliseconds = Annotated[float | None, Field(gt=0)]


class LoadTestGoals(BaseModel):
    """Upper bounds and one lower bound (``tokens_per_second``); each must hold for every server of the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_p50_ms: Milliseconds = None
    ttft_p99_ms: Milliseconds = None
    """Time to first token, from when the request was due."""
    itl_p50_ms: Milliseconds = None
    itl_p99_ms: Milliseconds = None
    """Inter-token latency, one sample per token."""
    e2e_p50_ms: Milliseconds = None
    e2e_p99_ms: Milliseconds = None
    """Time from when the request was due to the last token."""
    stall_p99_ms: Milliseconds = None
    """The longest time without a token in each answer."""
    error_rate: Annotated[float | None, Field(ge=0, le=1)] = None
    """Share of failed requests; intended disconnects do not count."""
    spikes: Annotated[int | None, Field(ge=0)] = None
    """Maximum number of spikes."""
    tokens_per_second: Annotated[float | None, Field(gt=0)] = None
    """Minimum number of output tokens per second, all streams together."""

    def given(self) -> dict[str, float]:
        """The goals that are set, by name."""
        return {name: float(value) for name, value in self.model_dump().items() if value is not None}


@dataclass(frozen=True)
class GoalResult:
    """One goal of one server with the measured value."""

    server: str
    goal: str
    limit: float
    found: float | None
    """None where the run has too little data."""
    met: bool

    @property
    def sentence(self) -> str:
        """A description for terminals and reports."""
        found = "not measured: too little data" if self.found is None else f"{self.found:.4g}"
        relation = "at least" if self.goal == "tokens_per_second" else "at most"
        return f"{self.server}: {self.goal} is {found}, should be {relation} {self.limit:.4g}"


def check_goals(goals: LoadTestGoals, server: str, found: dict[str, float | None]) -> Iterator[GoalResult]:
    """Compare every goal with the measured value; a goal without a value is missed."""
    for goal, limit in goals.given().items():
        value = found.get(goal)
        reached = value is not None and (value >= limit if goal == "tokens_per_second" else value <= limit)
        yield GoalResult(server, goal, limit, value, reached)
