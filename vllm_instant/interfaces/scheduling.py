"""The ``batching`` slot: which waiting requests start, and which running request is preempted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.speculation import StepOutcome


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """State of the scheduler at a decision: waiting and running requests, and free capacity."""

    waiting: Sequence[RequestState]
    """Waiting requests in the order of arrival, without preempted ones, which always resume first. ``len`` is free;
    the states are gathered at the first access."""
    running: Sequence[RequestState]
    """Running requests, with ``num_output_tokens`` up to date."""
    now: float
    """Time in seconds on a monotonic clock."""
    max_num_running: int
    """Maximum number of running requests."""
    free_kv_tokens: int
    """Number of tokens for which KV blocks are free."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The order in which waiting requests start, and their maximum number."""

    order: Sequence[int] = ()
    """Indices into ``SchedulerSnapshot.waiting`` in the order of start; all others follow in the order of arrival."""
    max_num_admitted: int | None = None
    """Maximum number of requests that start in this step; None for no limit beyond free places."""
    request_ids: Sequence[str] = ()
    """Request ids in the order of start, instead of ``order``: for policies that track the waiting requests themselves.
    The time per step then depends on the number of ids, not of waiting requests. Other ids than those of waiting
    requests are ignored."""


@runtime_checkable
class SchedulingPolicy(Protocol):
    """Decides which waiting requests start, the number of prompt tokens per step, and which request is preempted.

    Runs in the engine-core process. ``admit`` is called when a place is free, not in every step. An explicit
    ``priority`` of the requests takes precedence over it. With vLLM's scheduling policy ``priority``, vLLM decides on
    preemption.
    """

    def admit(self, snapshot: SchedulerSnapshot) -> Admission:
        """Return which requests may start now, and in which order."""
        ...

    def enter(self, request: RequestState) -> None:
        """A request started to wait. Optional."""
        return None

    def started(self, request: RequestState, now: float) -> None:
        """A request left the queue, for the first time or after a preemption. Optional."""
        return None

    def preempted(self, request: RequestState, now: float) -> None:
        """A running request lost its KV blocks and waits again. Optional."""
        return None

    def finished(self, request: RequestState, now: float, complete: bool) -> None:
        """A request left the engine; ``complete`` is False if it was aborted. Optional."""
        return None

    def preemption_order(self, running: Sequence[RequestState]) -> Sequence[int] | None:
        """Return all indices of ``running``, the request to preempt last first. Optional.

        Called when KV blocks run out. None for vLLM's choice, which preempts the request that started last.
        """
        return None

    def max_prompt_tokens(self, snapshot: SchedulerSnapshot) -> int | None:
        """Return the maximum number of prompt tokens that the next step prefills; None for no limit. Optional."""
        return None

    def background_work(self, snapshot: SchedulerSnapshot) -> None:
        """Do slow work: called while the model runs, when the scheduler is idle. Optional."""
        return None

    def observe(self, outcome: StepOutcome) -> None:
        """Learn from a finished step. Optional."""
        return None

    def metrics(self) -> Mapping[str, float]:
        """Return the policy's own gauges for ``/metrics``, by name. Optional."""
        return {}

    def decisions(self, last: int, request_id: str | None = None) -> Sequence[Mapping[str, Any]]:
        """Return why the newest requests started when they did, for ``vllm-instant explain --queue``. Optional.

        The form of a decision and the arguments are those of ``SpeculationPolicy.decisions``.
        """
        return ()

    def close(self) -> None:
        """Store what the next start needs; called when the engine stops. Optional."""
        return None
