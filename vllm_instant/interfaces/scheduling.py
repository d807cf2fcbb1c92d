"""The ``batching`` slot: which waiting requests start, and who is preempted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.speculation import StepOutcome


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """What a batching policy decides about: who waits, who runs, and how much room there is."""

    waiting: Sequence[RequestState]
    """In the order of arrival; their number is known, they themselves are gathered when somebody looks. Requests that
    lost their KV blocks are not among them: they always go first."""
    running: Sequence[RequestState]
    """With ``num_output_tokens`` up to date."""
    now: float
    """Seconds, monotonic."""
    max_num_running: int
    """Most requests that run together."""
    free_kv_tokens: int
    """Tokens for which there are free KV blocks."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Who may start."""

    order: Sequence[int] = ()
    """Indices into ``SchedulerSnapshot.waiting``, those first that shall start first; all others follow as they
    arrived."""
    max_num_admitted: int | None = None
    """Limit of the requests that start in this step; None for no limit beyond free places."""
    request_ids: Sequence[str] = ()
    """Request ids in place of ``order``, for a policy that knows who waits and need not look at everybody: a step costs
    what is named then, however many wait. Ids of those that do not wait are passed over."""


@runtime_checkable
class SchedulingPolicy(Protocol):
    """Decides which waiting requests start, how much of their prompts a step reads, and who is preempted.

    Runs in the engine-core process. The order is asked for when there is room for somebody, not in every step; an
    explicit ``priority`` of the requests stands above it. With vLLM's scheduling policy ``priority``, preemption is
    vLLM's.
    """

    def admit(self, moment: SchedulerSnapshot) -> Admission:
        """Who may start now, and in which order."""
        ...

    def enter(self, request: RequestState) -> None:
        """A request begins to wait. Optional."""
        return None

    def started(self, request: RequestState, now: float) -> None:
        """A request left the queue, or came back after it had lost its KV blocks. Optional."""
        return None

    def preempted(self, request: RequestState, now: float) -> None:
        """A running request lost its KV blocks and waits again. Optional."""
        return None

    def finished(self, request: RequestState, now: float, complete: bool) -> None:
        """A request left the engine; ``complete`` says whether it ended by itself. Optional."""
        return None

    def preemption_order(self, running: Sequence[RequestState]) -> Sequence[int] | None:
        """Indices of the running requests, those first that shall keep their KV blocks longest when blocks run out.

        None keeps vLLM's own choice, which preempts who started last. Asked only when blocks are short. Optional.
        """
        return None

    def max_prompt_tokens(self, moment: SchedulerSnapshot) -> int | None:
        """Most prompt tokens that the next step shall read beside the running requests' own; None: no limit.

        Optional.
        """
        return None

    def background_work(self, moment: SchedulerSnapshot) -> None:
        """Called while the model runs and nobody waits for an answer: the place for whatever takes long. Optional."""
        return None

    def observe(self, outcome: StepOutcome) -> None:
        """Learn from a finished step. Optional."""
        return None

    def metrics(self) -> Mapping[str, float]:
        """Numbers about itself, by name, for ``/metrics``. Optional."""
        return {}

    def decisions(self, last: int, request_id: str | None = None) -> Sequence[Mapping[str, Any]]:
        """Return why the newest requests started when they did, for ``vllm-instant explain --queue``. Optional.

        The form of a decision and the arguments are those of ``SpeculationPolicy.decisions``.
        """
        return ()

    def close(self) -> None:
        """The engine stops: keep what the next start should know. Optional."""
        return None
