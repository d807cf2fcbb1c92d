"""Who starts next, asked of a policy: the engine-independent half of the ``batching`` slot.

``vllm_instant.patches.admission`` feeds it from vLLM's scheduler and carries out what it decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.scheduling import Admission, SchedulerSnapshot, SchedulingPolicy
from vllm_instant.interfaces.speculation import StepOutcome


@dataclass
class BatchingCounters:
    """Totals since the engine started, in requests."""

    started: int = 0
    """Left the queue for the first time."""
    started_early: int = 0
    """Started while somebody waited who had come before."""
    preemptions: int = 0
    """Times that a running request lost its KV blocks."""


class Batching:
    """Asks a batching policy, checks what it answers, and counts.

    Args:
        policy: the policy behind its breaker.
        clock: seconds, monotonic; also the clock of ``RequestState.arrival_time``.

    """

    def __init__(self, policy: GuardedPlugin[SchedulingPolicy], clock: Callable[[], float] = time.monotonic) -> None:
        self.policy = policy
        self.counters = BatchingCounters()
        self.clock = clock
        kind = type(policy.instance)
        self.limits_prompts = kind.max_prompt_tokens is not SchedulingPolicy.max_prompt_tokens
        """Whether the policy has anything to say about how much of the prompts a step reads."""
        self.spares = kind.preemption_order is not SchedulingPolicy.preemption_order
        self.thinks = kind.background_work is not SchedulingPolicy.background_work
        self.observes = kind.observe is not SchedulingPolicy.observe

    def enter(self, state: RequestState) -> None:
        """A request begins to wait."""
        state.arrival_time = self.clock()
        self.policy.call("enter", lambda policy: policy.enter(state), None)

    def decisions(self, last: int, request_id: str | None = None) -> list[dict[str, Any]]:
        """Why the newest requests started when they did, as plain data."""
        nothing: list[dict[str, Any]] = []
        return self.policy.call(
            "decisions", lambda policy: [dict(d) for d in policy.decisions(last, request_id)], nothing
        )

    def started(self, state: RequestState, oldest_waiting: float) -> None:
        """A request left the queue; ``oldest_waiting`` is when the oldest of those that still wait arrived."""
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

    def admit(self, moment: SchedulerSnapshot) -> Admission:
        """Whom to start; as they came when the policy is disabled. Somebody starts when nobody runs."""

        def ask(policy: SchedulingPolicy) -> Admission:
            admission = policy.admit(moment)
            order = admission.order
            if order and not (0 <= min(order) and max(order) < len(moment.waiting) and len(set(order)) == len(order)):
                raise ContractError(f"an order names each of 0..{len(moment.waiting) - 1} at most once, found {order}")
            if len(set(admission.request_ids)) != len(admission.request_ids):
                raise ContractError(f"an order names each request at most once, found {admission.request_ids}")
            if admission.max_num_admitted is not None and admission.max_num_admitted < 0:
                raise ContractError(f"max_num_admitted must not be negative, found {admission.max_num_admitted}")
            return admission

        admission = self.policy.call("admit", ask, Admission())
        if admission.max_num_admitted == 0 and not moment.running:
            return replace(admission, max_num_admitted=1)
        return admission

    def preemption_order(self, running: Sequence[RequestState]) -> Sequence[int] | None:
        """Indices of those that run, those first that keep their KV blocks longest; None: vLLM's own choice."""

        def ask(policy: SchedulingPolicy) -> Sequence[int] | None:
            order = policy.preemption_order(running)
            if order is not None and sorted(order) != list(range(len(running))):
                raise ContractError(f"an order of all {len(running)} running requests was due, found {list(order)}")
            return order

        return self.policy.call("spare", ask, None)

    def max_prompt_tokens(self, moment: SchedulerSnapshot) -> int | None:
        """Most prompt tokens of the next step; None: no limit."""

        def ask(policy: SchedulingPolicy) -> int | None:
            most = policy.max_prompt_tokens(moment)
            if most is not None and most < 1:
                raise ContractError(f"a step must read at least one prompt token, found {most}")
            return most

        return self.policy.call("max_prompt_tokens", ask, None)

    def on_model_executing(self, moment: SchedulerSnapshot) -> None:
        """The step is on its way, and there is time."""
        self.policy.call("think", lambda policy: policy.background_work(moment), None)

    def observe(self, outcome: StepOutcome) -> None:
        """A step is over."""
        self.policy.call("observe", lambda policy: policy.observe(outcome), None)

    def totals(self) -> dict[str, Any]:
        """The counters, and what the policy measures of itself, as plain data."""

        def ask(policy: SchedulingPolicy) -> dict[str, float]:
            return {str(name): float(value) for name, value in policy.metrics().items()}

        nothing: dict[str, float] = {}
        return asdict(self.counters) | {"measures": self.policy.call("measures", ask, nothing)}

    def close(self) -> None:
        """The engine stops."""
        self.policy.call("close", lambda policy: policy.close(), None)
