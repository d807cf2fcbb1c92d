"""Admission of waiting requests: asks a scheduling policy, checks its results, and counts.

``vllm_instant.patches.admission`` calls this from vLLM's scheduler and applies the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.deployment.plain import decisions_of, gauges, whole, whole_numbers
from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.scheduling import Admission, SchedulerSnapshot, SchedulingPolicy
from vllm_instant.interfaces.speculation import StepOutcome


@dataclass
class AdmissionCounters:
    """Totals since the engine started, in requests."""

    started: int = 0
    """Requests that left the queue for the first time."""
    started_early: int = 0
    """Requests that started while an older one waited."""
    preemptions: int = 0
    """Number of times that a running request lost its KV blocks."""


class AdmissionController:
    """Calls a scheduling policy, checks its results, and counts.

    Args:
        policy: The guarded policy.
        clock: Monotonic time in seconds; also the clock of ``RequestState.arrival_time``.

    """

    def __init__(self, policy: GuardedPlugin[SchedulingPolicy], clock: Callable[[], float] = time.monotonic) -> None:
        self.policy = policy
        self.counters = AdmissionCounters()
        self.clock = clock
        kind = type(policy.instance)
        self.limits_prompts = kind.max_prompt_tokens is not SchedulingPolicy.max_prompt_tokens
        """Whether the policy implements ``max_prompt_tokens``."""
        self.orders_preemption = kind.preemption_order is not SchedulingPolicy.preemption_order
        self.has_background_work = kind.background_work is not SchedulingPolicy.background_work
        self.observes = kind.observe is not SchedulingPolicy.observe

    def enter(self, state: RequestState) -> None:
        """A request started to wait."""
        state.arrival_time = self.clock()
        self.policy.call("enter", lambda policy: policy.enter(state), None)

    def decisions(self, last: int, request_id: str | None = None) -> list[dict[str, Any]]:
        """Return why the newest requests started when they did, as plain data."""
        nothing: list[dict[str, Any]] = []
        return self.policy.call(
            "decisions", lambda policy: decisions_of(policy.decisions(last, request_id), last), nothing
        )

    def started(self, state: RequestState, oldest_waiting: float) -> None:
        """A request left the queue; ``oldest_waiting`` is the arrival time of the oldest request that still waits."""
        if not state.num_preemptions:
            self.counters.started += 1
            self.counters.started_early += oldest_waiting < state.arrival_time
        now = self.clock()
        self.policy.call("started", lambda policy: policy.started(state, now), None)

    def preempted(self, state: RequestState) -> None:
        """A running request lost its KV blocks."""
        state.num_preemptions += 1
        self.counters.preemptions += 1
        now = self.clock()
        self.policy.call("preempted", lambda policy: policy.preempted(state, now), None)

    def finished(self, state: RequestState, complete: bool) -> None:
        """A request left the engine."""
        now = self.clock()
        self.policy.call("finished", lambda policy: policy.finished(state, now, complete), None)

    def admit(self, snapshot: SchedulerSnapshot) -> Admission:
        """Return which requests start; first come, first served if the policy is disabled.

        At least one request may start if none is running.
        """
        num_waiting, num_running = len(snapshot.waiting), len(snapshot.running)

        def ask(policy: SchedulingPolicy) -> Admission:
            given = policy.admit(snapshot)
            if not isinstance(given, Admission):
                raise ContractError(f"expected an Admission, found {type(given).__name__}")
            order, request_ids = whole_numbers(given.order, "an order"), list(given.request_ids)
            limit = None if given.max_num_admitted is None else whole(given.max_num_admitted, "max_num_admitted")
            if order and not (0 <= min(order) and max(order) < num_waiting and len(set(order)) == len(order)):
                raise ContractError(f"an order names each of 0..{num_waiting - 1} at most once, found {order}")
            if not set(map(type, request_ids)) <= {str}:
                raise ContractError("request_ids must be strings")
            if len(set(request_ids)) != len(request_ids):
                raise ContractError(f"an order names each request at most once, found {request_ids}")
            if limit is not None and limit < 0:
                raise ContractError(f"max_num_admitted must not be negative, found {limit}")
            return Admission(order, limit, request_ids)

        admission = self.policy.call("admit", ask, Admission())
        if admission.max_num_admitted == 0 and not num_running:
            return replace(admission, max_num_admitted=1)
        return admission

    def preemption_order(self, running: Sequence[RequestState]) -> Sequence[int] | None:
        """Return the indices of ``running``, the request to preempt last first; None for vLLM's choice."""
        num_running = len(running)

        def ask(policy: SchedulingPolicy) -> Sequence[int] | None:
            given = policy.preemption_order(running)
            if given is None:
                return None
            order = whole_numbers(given, "an order")
            if sorted(order) != list(range(num_running)):
                raise ContractError(f"expected an order of all {num_running} running requests, found {order}")
            return order

        return self.policy.call("preemption_order", ask, None)

    def max_prompt_tokens(self, snapshot: SchedulerSnapshot) -> int | None:
        """Return the maximum number of prompt tokens in the next step; None for no limit."""

        def ask(policy: SchedulingPolicy) -> int | None:
            given = policy.max_prompt_tokens(snapshot)
            if given is None:
                return None
            limit = whole(given, "max_prompt_tokens")
            if limit < 1:
                raise ContractError(f"max_prompt_tokens must be at least 1, found {limit}")
            return limit

        return self.policy.call("max_prompt_tokens", ask, None)

    def on_model_executing(self, snapshot: SchedulerSnapshot) -> None:
        """The model runs: let the policy do slow work."""
        self.policy.call("background_work", lambda policy: policy.background_work(snapshot), None)

    def observe(self, outcome: StepOutcome) -> None:
        """A step finished."""
        self.policy.call("observe", lambda policy: policy.observe(outcome), None)

    def totals(self) -> dict[str, Any]:
        """Return the counters and the policy's own gauges (``measures``) as plain data."""

        def ask(policy: SchedulingPolicy) -> dict[str, float]:
            return gauges(policy.metrics())

        nothing: dict[str, float] = {}
        return asdict(self.counters) | {"measures": self.policy.call("metrics", ask, nothing)}

    def close(self) -> None:
        """The engine stops."""
        self.policy.call("close", lambda policy: policy.close(), None)
