"""The speculation budget: how many draft tokens each request gets, asked of a policy, step by step.

This is the engine-independent half; ``vllm_instant.seams.scheduler`` feeds it from vLLM's scheduler and carries out
what it decides. It keeps one live ``RequestState`` a request, contains a failing policy, and counts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_instant.containment import Contained, ContractError
from vllm_instant.contracts import RequestState, SpeculationPolicy, StepOutcome


@dataclass
class SpeculationCounters:
    """Totals since the engine started, in draft tokens unless named otherwise."""

    budgeted: int = 0
    """Granted by the policy."""
    proposed: int = 0
    """Drafted by the drafter and sent to verification."""
    accepted: int = 0
    steps: int = 0
    """Engine steps that were planned."""
    steps_without_drafting: int = 0
    """Planned steps in which no request was granted any draft token."""


class SpeculationBudget:
    """Asks a policy for draft lengths and tells it what became of them.

    Args:
        policy: the policy behind its breaker.
        max_draft_tokens: most draft tokens a request can get in one step (vLLM's ``num_speculative_tokens``).

    """

    def __init__(self, policy: Contained[SpeculationPolicy], max_draft_tokens: int) -> None:
        self.policy = policy
        self.max_draft_tokens = max_draft_tokens
        self.counters = SpeculationCounters()
        self.states: dict[str, RequestState] = {}
        """The live states of all admitted requests, by request id."""
        self._step_started: dict[int, float] = {}

    def admit(self, state: RequestState) -> None:
        """A request entered the engine."""
        self.states[state.request_id] = state

    def forget(self, request_id: str) -> None:
        """A request ended or was aborted."""
        if self.states.pop(request_id, None) is not None:
            self.policy.call("forget", lambda policy: policy.forget(request_id), None)

    def plan(self, states: Sequence[RequestState]) -> list[int]:
        """Draft lengths for the step now being scheduled, one a request, each in ``0..max_draft_tokens``.

        When the policy is disabled every request gets the full length, which is what vLLM does by itself.
        """
        most = self.max_draft_tokens

        def ask(policy: SpeculationPolicy) -> list[int]:
            lengths = list(policy.draft_lengths(states, most))
            if len(lengths) != len(states):
                raise ContractError(f"{len(states)} lengths were due, {len(lengths)} came")
            if lengths and not (0 <= min(lengths) and max(lengths) <= most):
                raise ContractError(f"lengths must lie in 0..{most}, found {min(lengths)}..{max(lengths)}")
            return lengths

        full = [most] * len(states)
        lengths = self.policy.call("draft_lengths", ask, full) if states else full
        self.counters.steps += 1
        granted = sum(lengths)
        self.counters.budgeted += granted
        self.counters.steps_without_drafting += bool(states) and granted == 0
        return lengths

    def step_scheduled(self, step: int) -> None:
        """Note when a step went out; ``step`` is any number that ``step_finished`` repeats."""
        self._step_started[step] = time.perf_counter()

    def step_finished(
        self,
        step: int,
        states: Sequence[RequestState],
        drafted: Sequence[int],
        accepted: Sequence[int],
        num_scheduled_tokens: int,
    ) -> None:
        """Count a finished step and show it to the policy."""
        started = self._step_started.pop(step, None)
        seconds = time.perf_counter() - started if started is not None else 0.0
        self.counters.proposed += sum(drafted)
        self.counters.accepted += sum(accepted)
        outcome = StepOutcome(states, drafted, accepted, num_scheduled_tokens, seconds)
        self.policy.call("observe", lambda policy: policy.observe(outcome), None)

    def totals(self) -> dict[str, Any]:
        """The counters as plain data."""
        return asdict(self.counters)
