"""Draft budgets: asks a speculation policy, step by step, how many draft tokens each request gets.

``vllm_instant.patches.scheduler`` calls this from vLLM's scheduler and applies the result. The manager guards the
policy with a circuit breaker, applies the numbers that clients fixed, measures the steps, and counts.

A policy may need hundreds of microseconds. While the model runs the engine core is idle, so that is when the policy
learns from outcomes and plans the next step. The policy is called during scheduling only if a request is new, and in
the first steps of a server.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.deployment.plain import decisions_of, finite, whole, whole_numbers
from vllm_instant.interfaces.experts import ExpertCount
from vllm_instant.interfaces.plugins import FullGraphs
from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.speculation import DraftCost, SpeculationPolicy, StepOutcome, UpcomingStep
from vllm_instant.scheduling.request_registry import RequestRegistry
from vllm_instant.speculation.draft_plan import DraftPlan, DraftReport

CLIENT_KEY = "instant_speculation"
"""Key of a client's ``vllm_xargs``: ``"off"``, ``"auto"`` or a number of draft tokens."""

FIRST_STEPS = 16
"""The first steps of a server are planned when they are scheduled, with the outcome of the step before: each of the
first outcomes changes the plans, and one that is known a step later costs a step."""
_NO_REQUESTS: frozenset[str] = frozenset()
MAX_HELD_SHARE = 0.25
"""Share of the steps in which a draft model waits for first tokens at most: a busy server reads prompts in each."""
_HELD_MEMORY = 0.98
_FREE = DraftCost()
_COSTS = tuple(field.name for field in fields(DraftCost) if field.name != "verify_cost_curve")


def requested_num_draft_tokens(extra_args: Mapping[str, Any] | None) -> int | None:
    """Return the number of draft tokens that a client fixed; None where the policy decides.

    Raises:
        ValueError: The value is not ``"off"``, ``"auto"`` or a whole number from 0.

    """
    value = (extra_args or {}).get(CLIENT_KEY)
    if value is None or value == "auto":
        return None
    if value == "off":
        return 0
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f'vllm_xargs: {CLIENT_KEY} must be "off", "auto" or a whole number from 0, found {value!r}')


def checked_cost(cost: DraftCost) -> DraftCost:
    """Return a cost of drafts whose numbers are plain and finite, with increasing numbers of draft tokens.

    Raises:
        ContractError: The cost is of another type, or a number is not finite.

    """
    if not isinstance(cost, DraftCost):
        raise ContractError(f"expected a DraftCost, found {type(cost).__name__}")
    curve = tuple((whole(number, "a number of tokens"), finite(value)) for number, value in cost.verify_cost_curve)
    numbers = [number for number, _ in curve]
    if any(one >= other for one, other in zip([0, *numbers], numbers, strict=False)):
        raise ContractError(f"verify_cost_curve must have increasing numbers from 1, found {numbers}")
    scalars = {name: finite(getattr(cost, name), name) for name in _COSTS}
    return DraftCost(verify_cost_curve=curve, **scalars)


@dataclass
class SpeculationCounters:
    """Totals since the engine started, in draft tokens unless the name says otherwise."""

    budgeted: int = 0
    """Draft budgets of the policy and of clients."""
    proposed: int = 0
    """Draft tokens that were verified."""
    accepted: int = 0
    """Draft tokens that were accepted."""
    steps: int = 0
    """Number of planned engine steps."""
    full_graph_steps: int = 0
    """Number of decoding steps that ran as one CUDA graph."""
    piecewise_steps: int = 0
    """Number of decoding steps outside of such graphs, on devices that have them."""
    steps_without_drafting: int = 0
    """Number of planned steps in which all draft budgets were 0."""


class DraftBudgetManager:
    """Asks a policy for draft budgets and reports the outcomes to it.

    Args:
        policy: The guarded policy.
        max_draft_tokens: Maximum number of draft tokens per request and step (vLLM's ``num_speculative_tokens``).
        clock: Monotonic time in seconds.
        requests: The registry of live requests, if another owner admits and forgets them; by default an own one.
        graphs: The decoding steps that run as one CUDA graph; None where the device has no such graphs.
        adaptive_verification: Whether vLLM may trim drafts before it verifies them.

    """

    def __init__(
        self,
        policy: GuardedPlugin[SpeculationPolicy],
        max_draft_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
        requests: RequestRegistry | None = None,
        graphs: FullGraphs | None = None,
        adaptive_verification: bool = False,
    ) -> None:
        self.policy = policy
        self.max_draft_tokens = max_draft_tokens
        self.counters = SpeculationCounters()
        self._graphs = graphs
        self._requests = RequestRegistry() if requests is None else requests
        self._is_registrar = requests is None
        self.states = self._requests.states
        """States of all live requests, by request id."""
        self._clock = clock
        # Policies receive the states themselves. What the engine depends on is stored here, where none can change it.
        self._id_of: dict[RequestState, str] = {}
        self._salts: dict[RequestState, str] = {}
        """Cache salts of the live requests that have one."""
        self._fixed: dict[RequestState, int] = {}
        """Numbers of draft tokens of the live requests whose clients fixed them."""
        self._number = 0
        self._began: dict[int, tuple[float, int, bool]] = {}
        """Start time and number of each running step, and whether its drafts may be trimmed."""
        self._latest_begin = 0.0
        self._busy_since: float | None = None
        self._outcomes: deque[StepOutcome] = deque()
        """Finished steps that the policy has not observed yet."""
        self._planned: Sequence[RequestState] = ()
        """Requests of the latest plan."""
        self._all_alive = True
        """Whether none of these has ended since."""
        self._ahead: tuple[Sequence[RequestState], list[int]] | None = None
        """Requests and draft budgets of the next step, planned while the model ran."""
        self._ids: tuple[Sequence[RequestState], list[str]] = ((), [])
        """Requests of the latest plan and their ids, which are mostly those of the next one."""
        self._draft_cost = _FREE
        self._given_cost: tuple[DraftCost, DraftCost] = (_FREE, _FREE)
        """The latest cost of drafts as the policy gave it, and as it was checked."""
        self._adaptive_verification = adaptive_verification
        self._may_trim = adaptive_verification
        """Whether the drafts of the step that the policy was asked about last may be trimmed before verification,"""
        self._may_trim_next = adaptive_verification
        """the drafts that the latest planned step makes,"""
        self._may_trim_now = adaptive_verification
        """and the drafts that it verifies."""
        self._held_share = 0.0
        """Share of recent steps in which a draft model waited for first tokens."""
        self._waiting: tuple[int, float] = (0, 0.0)

    # ---------------------------------------------------------------------------------------------- requests

    def admit(self, state: RequestState) -> None:
        """A request entered the engine."""
        # Pending outcomes may concern an ended request whose index the new one gets.
        self._show_outcomes()
        self._requests.admit(state)
        try:
            requested = requested_num_draft_tokens(state.extra_args)
        except ValueError:
            requested = None  # ``patches.request_validation`` refuses it in the API server
        if state.fixed_num_draft_tokens is None and requested is not None:
            state.fixed_num_draft_tokens = min(requested, self.max_draft_tokens)
        self._id_of[state] = state.request_id
        if state.cache_salt:
            self._salts[state] = state.cache_salt
        if state.fixed_num_draft_tokens is not None:
            self._fixed[state] = state.fixed_num_draft_tokens
        self.policy.call("enter", lambda policy: policy.enter(state), None)

    def forget(self, request_id: str) -> None:
        """A request ended or was aborted."""
        state = self.states.get(request_id)
        if state is not None:
            self._all_alive = False
            for table in (self._id_of, self._salts, self._fixed):
                table.pop(state, None)
            self.policy.call("forget", lambda policy: policy.forget(request_id), None)
            if self._is_registrar:
                self._requests.forget(request_id)

    # ------------------------------------------------------------------------------------------------- steps

    def step_begins(self) -> None:
        """The scheduling of a step begins."""
        self._latest_begin = self._clock()

    def plan(
        self,
        states: Sequence[RequestState],
        num_waiting: int = 0,
        max_wait: float = 0.0,
        max_draft_tokens: int | None = None,
    ) -> list[int]:
        """Return the draft budget of each request in the step being scheduled, in ``0..max_draft_tokens``.

        With a disabled policy every request gets the maximum, as in vLLM without vllm-instant. ``max_draft_tokens``
        limits this step; the manager's maximum by default.
        """
        self._number += 1
        self._may_trim_now = self._may_trim_next
        self._planned, self._all_alive, self._waiting = states, True, (num_waiting, max_wait)
        limit = self.max_draft_tokens if max_draft_tokens is None else max_draft_tokens
        budgets = self._planned_ahead(states) if limit == self.max_draft_tokens else None
        if budgets is None:
            self._ahead = None
            self._show_outcomes()
            budgets = self._ask(states, self._number, limit)
        self._may_trim_next = self._may_trim
        if self._fixed and limit:
            budgets = [self._fixed.get(state, budget) for state, budget in zip(states, budgets, strict=True)]
        self.counters.steps += 1
        total = sum(budgets)
        self.counters.budgeted += total
        self.counters.steps_without_drafting += bool(states) and total == 0
        return budgets

    def _planned_ahead(self, states: Sequence[RequestState]) -> list[int] | None:
        """The plan for these requests that was made while the model ran; None if one of them is new."""
        if self._ahead is None:
            return None
        (known, budgets), self._ahead = self._ahead, None
        if states == known:
            return budgets
        budget_of = dict(zip(known, budgets, strict=True))
        try:
            return [budget_of[state] for state in states]
        except KeyError:
            return None

    def plan_drafts(
        self,
        states: Sequence[RequestState],
        num_waiting: int = 0,
        max_wait: float = 0.0,
        *,
        hold_model: bool = False,
        only_model: bool = False,
        no_drafts: bool = False,
    ) -> DraftPlan:
        """Return the result of ``plan`` with the cost of drafts, for the workers.

        Args:
            states: The requests that sample a token in the step.
            num_waiting: Number of requests that wait for their first step.
            max_wait: Waiting time of the oldest of these, in seconds.
            hold_model: Whether a draft model should not run after this step, because a prompt is read in it: the
                draft model would read it, too, and draft, before the first token leaves the engine. It runs all the
                same where that were more than ``MAX_HELD_SHARE`` of the steps.
            only_model: Whether there is no other source of drafts than a draft model.
            no_drafts: Whether no draft can be verified in the next step.

        """
        held = hold_model and self._held_share < MAX_HELD_SHARE
        self._held_share = _HELD_MEMORY * self._held_share + (1 - _HELD_MEMORY) * held
        budgets = self.plan(states, num_waiting, max_wait, 0 if no_drafts or (held and only_model) else None)
        if self._ids[0] != states:
            self._ids = list(states), [self._id_of.get(state, state.request_id) for state in states]
        return DraftPlan(
            dict(zip(self._ids[1], budgets, strict=True)),
            self._draft_cost,
            frozenset(self._id_of[state] for state in states if self._fixed.get(state))
            if self._fixed
            else _NO_REQUESTS,
            {self._id_of[state]: self._salts[state] for state in states if state in self._salts} if self._salts else {},
            not held,
            trims_verification=self._may_trim_now,
        )

    def on_model_executing(self) -> None:
        """The model runs: let the policy learn from earlier steps and plan the next one."""
        self._show_outcomes()
        alive = list(self._planned)
        if not self._all_alive:
            alive = [state for state in alive if state in self._id_of]
        if alive and self._number >= FIRST_STEPS:
            self._ahead = alive, self._ask(alive, self._number + 1)

    def _show_outcomes(self) -> None:
        while self._outcomes:
            outcome = self._outcomes.popleft()
            self.policy.call("observe", lambda policy, outcome=outcome: policy.observe(outcome), None)  # type: ignore[misc]

    def _ask(self, states: Sequence[RequestState], number: int, limit: int | None = None) -> list[int]:
        maximum = self.max_draft_tokens
        limit = maximum if limit is None else limit
        # A list of its own: the engine's must not change with it.
        step = UpcomingStep(list(states), limit, *self._waiting, number)

        def ask(policy: SpeculationPolicy) -> list[int]:
            budgets = whole_numbers(policy.get_num_draft_tokens(step), "draft budgets")
            if len(budgets) != len(states):
                raise ContractError(f"expected {len(states)} draft budgets, found {len(budgets)}")
            distinct = set(budgets)
            if not (0 <= min(distinct) and max(distinct) <= maximum):
                raise ContractError(f"draft budgets must lie in 0..{maximum}, found {min(distinct)}..{max(distinct)}")
            # A policy need not know that some steps allow fewer.
            return budgets if limit == maximum else [min(budget, limit) for budget in budgets]

        if not states:
            return []
        budgets = self.policy.call("get_num_draft_tokens", ask, [limit] * len(states))
        self._draft_cost = self.policy.call("draft_cost", self._checked_cost, _FREE)
        if self._adaptive_verification:
            self._may_trim = self.policy.call("trims_verification", lambda policy: policy.trims_verification(), True)
        return budgets

    def _checked_cost(self, policy: SpeculationPolicy) -> DraftCost:
        """The policy's cost of drafts as plain numbers, which travel to the workers."""
        given = policy.draft_cost()
        if given is not self._given_cost[0] and given != self._given_cost[0]:
            self._given_cost = given, checked_cost(given)
        return self._given_cost[1]

    def step_scheduled(self, step: int) -> None:
        """The step that began last is sent to the workers; ``step`` is any number, repeated in ``step_finished``."""
        self._began[step] = (self._latest_begin, self._number, self._may_trim_now)

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
        """Count a finished step; the policy observes it while the next model run is in progress."""
        now = self._clock()
        began, number, trimmed = self._began.pop(step, (now, 0, False))
        seconds = now - (began if self._busy_since is None else self._busy_since)
        self._busy_since = now
        total = sum(drafted)
        self.counters.proposed += total
        if self._graphs is not None and states and num_scheduled_tokens == len(states) + total:
            in_graph = self._graphs.cover(drafted)
            self.counters.full_graph_steps += in_graph
            self.counters.piecewise_steps += not in_graph
        self.counters.accepted += sum(accepted)
        self._outcomes.append(
            StepOutcome(
                list(states),
                list(drafted),
                list(accepted),
                num_scheduled_tokens,
                seconds,
                num_scheduled_requests,
                number,
                draft_steps,
                experts,
                trimmed=trimmed and total > 0,
            )
        )

    def on_draft_report(self, report: DraftReport) -> None:
        """The workers report on the drafts after the step that finished last."""
        if self._outcomes and report.draft_steps is not None:
            self._outcomes[-1] = replace(
                self._outcomes[-1], draft_steps=report.draft_steps, uncached_tokens=report.uncached_tokens
            )

    def engine_idles(self) -> None:
        """The engine is idle: the time until the next step counts for no step."""
        self._busy_since = None

    # --------------------------------------------------------------------------------------------- reporting

    def totals(self) -> dict[str, Any]:
        """Return the counters as plain data."""
        return asdict(self.counters)

    def decisions(self, last: int, request_id: str | None = None) -> list[dict[str, Any]]:
        """Return the policy's newest decisions as plain data (``SpeculationPolicy.decisions``)."""
        self._show_outcomes()
        nothing: list[dict[str, Any]] = []
        return self.policy.call(
            "decisions", lambda policy: decisions_of(policy.decisions(last, request_id), last), nothing
        )

    def close(self) -> None:
        """The engine stops."""
        self._show_outcomes()
        self.policy.call("close", lambda policy: policy.close(), None)
