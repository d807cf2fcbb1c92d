"""Everything that a recorded run shows: percentiles, spikes and their causes, goals, servers beside each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_instant_loadtests.goals import Checked, Goals
from vllm_instant_loadtests.recording import Run


@dataclass(frozen=True)
class Analysis:
    """What a run shows."""

    about: dict[str, Any]
    goals: list[Checked] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether every goal was reached on every server; the exit code follows it."""
        return all(checked.met for checked in self.goals)

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        raise NotImplementedError

    def summary(self) -> str:
        """For a terminal: spikes, goals and verdicts, one a line."""
        raise NotImplementedError


def analyse(run: Run, goals: Goals | None = None) -> Analysis:
    """Everything about a run; without ``goals``, those that its scenario had count."""
    raise NotImplementedError
