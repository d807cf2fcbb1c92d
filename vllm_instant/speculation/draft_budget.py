"""The speculation budget: how many draft tokens each request gets, asked of a policy, step by step.

This is the engine-independent half; ``vllm_instant.patches.scheduler`` feeds it from vLLM's scheduler and carries out
what it decides. It keeps one live ``RequestState`` a request, contains a failing policy, lets clients overrule it for
their own requests, measures the steps, and counts.

A policy may think for hundreds of microseconds, which nobody shall wait for: while the model runs, the engine core has
nothing to do, and that is when outcomes are shown to the policy and when it plans the step after. Only when a request
appears that such a plan does not know is the policy asked in the middle of scheduling.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.interfaces.experts import ExpertCount
from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.speculation import DraftCost, SpeculationPolicy, StepOutcome, UpcomingStep
from vllm_instant.scheduling.request_registry import RequestRegistry
from vllm_instant.speculation.draft_plan import DraftPlan, DraftReport

CLIENT_KEY = "instant_speculation"
"""What a client writes into ``vllm_xargs``: ``"off"``, ``"auto"`` or a number of draft tokens."""


NOBODY: frozenset[str] = frozenset()


def requested_num_draft_tokens(extra_args: Mapping[str, Any] | None) -> int | None:
    """The draft length that a client asked for, or None when the policy decides.

    Raises:
        ValueError: when the value is none of ``"off"``, ``"auto"`` and a whole number from 0.

    """
    value = (extra_args or {}).get(CLIENT_KEY)
    if value is None or value == "auto":
        return None
    if value == "off":
        return 0
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f'vllm_xargs: {CLIENT_KEY} must be "off", "auto" or a whole number from 0, found {value!r}')


@dataclass
class SpeculationCounters:
    """Totals since the engine started, in draft tokens unless named otherwise."""

    budgeted: int = 0
    """Granted by the policy or asked for by the client."""
    proposed: int = 0
    """Drafted by the drafter and sent to verification."""
    accepted: int = 0
    steps: int = 0
    """Engine steps that were planned."""
    steps_without_drafting: int = 0
    """Planned steps in which no request was granted any draft token."""


class DraftBudgetManager:
    """Asks a policy for draft lengths and tells it what became of them.

    Args:
        policy: the policy behind its breaker.
        max_draft_tokens: most draft tokens a request can get in one step (vLLM's ``num_speculative_tokens``).
        clock: seconds, monotonic.
        requests: where requests are admitted and forgotten by somebody else; by default, here.

    """

    def __init__(
        self,
        policy: GuardedPlugin[SpeculationPolicy],
        max_draft_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
        requests: RequestRegistry | None = None,
    ) -> None:
        self.policy = policy
        self.max_draft_tokens = max_draft_tokens
        self.counters = SpeculationCounters()
        self._requests = RequestRegistry() if requests is None else requests
        self._is_registrar = requests is None
        self.states = self._requests.states
        """The live states of all admitted requests, by request id."""
        self._clock = clock
        self._num_salted = 0
        """Admitted requests that have a cache salt."""
        self._num_pinned = 0
        """Admitted requests whose clients asked for a length."""
        self._number = 0
        self._began: dict[int, tuple[float, int]] = {}
        """When each step that is under way began, and its number."""
        self._latest_begin = 0.0
        self._busy_since: float | None = None
        self._outcomes: deque[StepOutcome] = deque()
        """Finished steps that the policy has not seen yet."""
        self._planned: Sequence[RequestState] = ()
        """The requests of the newest plan."""
        self._none_left = True
        """None of them has ended since."""
        self._ahead: tuple[Sequence[RequestState], list[int]] | None = None
        """The next plan, made while the model ran: a length for each of these requests."""
        self._named: tuple[Sequence[RequestState], list[str]] = ((), [])
        """The ids of the requests of the newest plan: mostly those of the next one."""
        self._draft_cost = DraftCost()
        self._waiting: tuple[int, float] = (0, 0.0)

    # ---------------------------------------------------------------------------------------------- requests

    def admit(self, state: RequestState) -> None:
        """A request entered the engine."""
        # What the policy has not seen yet may be about one that ended, whose index this one may get.
        self._show_outcomes()
        self._requests.admit(state)
        try:
            length = requested_num_draft_tokens(state.extra_args)
        except ValueError:
            length = (
                None  # refused at the door where there is one (patches/request_options.py); else the policy decides
            )
        if state.fixed_num_draft_tokens is None and length is not None:
            state.fixed_num_draft_tokens = min(length, self.max_draft_tokens)
        self._num_salted += bool(state.cache_salt)
        self._num_pinned += state.fixed_num_draft_tokens is not None
        self.policy.call("enter", lambda policy: policy.enter(state), None)

    def forget(self, request_id: str) -> None:
        """A request ended or was aborted."""
        state = self.states.get(request_id)
        if state is not None:
            self._none_left = False
            self._num_salted -= bool(state.cache_salt)
            self._num_pinned -= state.fixed_num_draft_tokens is not None
            self.policy.call("forget", lambda policy: policy.forget(request_id), None)
            if self._is_registrar:
                self._requests.forget(request_id)

    # ------------------------------------------------------------------------------------------------- steps

    def step_begins(self) -> None:
        """The scheduler starts to put a step together."""
        self._latest_begin = self._clock()

    def plan(self, states: Sequence[RequestState], num_waiting: int = 0, max_wait: float = 0.0) -> list[int]:
        """Draft lengths for the step now being scheduled, one a request, each in ``0..max_draft_tokens``.

        When the policy is disabled every request gets the full length, which is what vLLM does by itself.
        """
        self._number += 1
        self._planned, self._none_left, self._waiting = states, True, (num_waiting, max_wait)
        lengths = self._planned_ahead(states)
        if lengths is None:
            self._show_outcomes()
            lengths = self._ask(states, self._number)
        if self._num_pinned:
            lengths = [
                length if state.fixed_num_draft_tokens is None else state.fixed_num_draft_tokens
                for state, length in zip(states, lengths, strict=True)
            ]
        self.counters.steps += 1
        granted = sum(lengths)
        self.counters.budgeted += granted
        self.counters.steps_without_drafting += bool(states) and granted == 0
        return lengths

    def _planned_ahead(self, states: Sequence[RequestState]) -> list[int] | None:
        """What was planned for these requests while the model ran; None when one of them is new."""
        if self._ahead is None:
            return None
        (known, lengths), self._ahead = self._ahead, None
        if states == known:
            return lengths
        ahead = {state.request_id: length for state, length in zip(known, lengths, strict=True)}
        try:
            return [ahead[state.request_id] for state in states]
        except KeyError:
            return None

    def plan_drafts(self, states: Sequence[RequestState], num_waiting: int = 0, max_wait: float = 0.0) -> DraftPlan:
        """``plan`` as the workers need it."""
        lengths = self.plan(states, num_waiting, max_wait)
        if self._named[0] != states:
            self._named = list(states), [state.request_id for state in states]
        return DraftPlan(
            dict(zip(self._named[1], lengths, strict=True)),
            self._draft_cost,
            frozenset(state.request_id for state in states if state.fixed_num_draft_tokens)
            if self._num_pinned
            else NOBODY,
            {state.request_id: state.cache_salt for state in states if state.cache_salt} if self._num_salted else {},
        )

    def on_model_executing(self) -> None:
        """The step is on its way, and there is time: learn from those before it and plan the one after it."""
        self._show_outcomes()
        alive = list(self._planned)
        if not self._none_left:
            alive = [state for state in alive if state.request_id in self.states]
        if alive:
            self._ahead = alive, self._ask(alive, self._number + 1)

    def _show_outcomes(self) -> None:
        while self._outcomes:
            outcome = self._outcomes.popleft()
            self.policy.call("observe", lambda policy, outcome=outcome: policy.observe(outcome), None)  # type: ignore[misc]

    def _ask(self, states: Sequence[RequestState], number: int) -> list[int]:
        most = self.max_draft_tokens
        step = UpcomingStep(states, most, *self._waiting, number)

        def ask(policy: SpeculationPolicy) -> list[int]:
            lengths = list(policy.get_num_draft_tokens(step))
            if len(lengths) != len(states):
                raise ContractError(f"{len(states)} lengths were due, {len(lengths)} came")
            different = set(lengths)
            if not (0 <= min(different) and max(different) <= most):
                raise ContractError(f"lengths must lie in 0..{most}, found {min(different)}..{max(different)}")
            return lengths

        if not states:
            return []
        full = [most] * len(states)
        lengths = self.policy.call("get_num_draft_tokens", ask, full)
        self._draft_cost = self.policy.call("price", lambda policy: policy.draft_cost(), DraftCost())
        return lengths

    def step_scheduled(self, step: int) -> None:
        """The step that began last goes out; ``step`` is any number that ``step_finished`` repeats."""
        self._began[step] = (self._latest_begin, self._number)

    def step_finished(
        self,
        step: int,
        states: Sequence[RequestState],
        drafted: Sequence[int],
        accepted: Sequence[int],
        *,
        num_scheduled_tokens: int,
        num_scheduled_requests: int = 0,
        draft_steps: int = 0,
        experts: ExpertCount | None = None,
    ) -> None:
        """Count a finished step; the policy sees it when there is time."""
        now = self._clock()
        began, number = self._began.pop(step, (now, 0))
        seconds = now - (began if self._busy_since is None else self._busy_since)
        self._busy_since = now
        self.counters.proposed += sum(drafted)
        self.counters.accepted += sum(accepted)
        self._outcomes.append(
            StepOutcome(
                states,
                drafted,
                accepted,
                num_scheduled_tokens,
                seconds,
                num_scheduled_requests,
                number,
                draft_steps,
                experts,
            )
        )

    def drafted(self, report: DraftReport) -> None:
        """The workers report what they did after the step that finished last."""
        if self._outcomes and report.draft_steps is not None:
            self._outcomes[-1] = replace(
                self._outcomes[-1], draft_steps=report.draft_steps, uncached_tokens=report.uncached_tokens
            )

    def engine_idles(self) -> None:
        """Nothing is left to do: the time until the next step begins is nobody's cost."""
        self._busy_since = None

    # --------------------------------------------------------------------------------------------- reporting

    def totals(self) -> dict[str, Any]:
        """The counters as plain data."""
        return asdict(self.counters)

    def decisions(self, last: int, request_id: str | None = None) -> list[dict[str, Any]]:
        """The policy's newest decisions as plain data; see ``SpeculationPolicy.decisions``."""
        self._show_outcomes()
        nothing: list[dict[str, Any]] = []
        return self.policy.call(
            "decisions", lambda policy: [dict(d) for d in policy.decisions(last, request_id)], nothing
        )

    def close(self) -> None:
        """The engine stops."""
        self._show_outcomes()
        self.policy.call("close", lambda policy: policy.close(), None)
