"""The ``goodput`` policy: for every step the draft lengths with the most expected tokens per second.

It knows requests, acceptance and step times, nothing of an engine: the same object serves vLLM's synchronous and
asynchronous schedulers, the simulator and the tests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant import DraftCost, FullGraphs, RequestState, SpeculationPolicy, StepOutcome, UpcomingStep
from vllm_instant_plugins.acceptance import AcceptanceModel
from vllm_instant_plugins.goodput.adaptive_verification import VerificationChoice
from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.goodput.decision_log import NOT_ESTIMATED, Decision, DecisionLog
from vllm_instant_plugins.goodput.draft_cost import FREE, DraftCostEstimator, free_up_to, scaled
from vllm_instant_plugins.goodput.drafting_switch import MIN_RETURN_ON_DELAY, DraftingSwitch
from vllm_instant_plugins.goodput.exploration import Explorer, StepContext
from vllm_instant_plugins.goodput.latency_slo import LatencySlo
from vllm_instant_plugins.goodput.listening import CURIOUS_COST, Listener
from vllm_instant_plugins.goodput.planner import StepPlan, max_step_seconds, no_drafts
from vllm_instant_plugins.goodput.request_table import Batch, RequestTable, to_indices
from vllm_instant_plugins.goodput.saved_costs import SavedCosts
from vllm_instant_plugins.state_store import PersistentState

Indices = npt.NDArray[np.intp]
Array = npt.NDArray[np.float64]

BACKOFF_STEPS = 4
INITIAL_DRAFT_TOKENS = 2
"""Limit of a request's draft tokens on a new server;"""
MIN_EXPLORED = 4
"""Minimum number of draft tokens that an exploration of a whole step may verify."""
GROWTH = 4
"""it grows to this many times the longest accepted draft."""
MAX_UNDELIVERED_STEPS = 128
"""After this many steps whose drafts were all trimmed or not found, the next drafts have no limit for others' pace.

The limit follows from what each request gets on average. A drafter that is rarely sure gives little on average, and if
that were all, its best drafts would never be verified and their value never be learned. So rare a step is outside of a
p99. A request alone delays no other, and never has the limit.
"""
_MEMORY = 0.97
CALIBRATION_PRIOR = 8.0
"""Accepted tokens, as many as expected, that are assumed beside those observed: of few tokens the ratio is chance."""


class GoodputPolicy(SpeculationPolicy):
    """Chooses draft lengths by expected tokens per second.

    Args:
        max_draft_tokens: limit of a request's draft tokens in one step.
        max_requests: limit of requests that decode together.
        slo: latency goals, if any.
        store: keeps learned costs; None: they are not kept.
        calibrating: try random draft lengths, to learn the costs of all of them, instead of choosing the best.
        log_changes: log when drafting starts or stops to pay.
        confident_drafts: the drafter states confidences, and its drafts are trimmed by ``draft_cost``: then it is asked
            for as much as it can deliver as soon as that earns its cost, however rarely it delivers anything.
        self_calibrating: such drafts take next to no time, and the drafter compares unverified drafts as well with what
            comes: without latency goals it is asked in every step, and no drafts are verified to judge it.
        slowest_request: lower bound on the speed of each request, relative to no drafts.
        graphs: decoding steps that run as one CUDA graph; all others take longer. None: there is no such difference.
        adaptive_verification: vLLM can trim drafts before it verifies them; without latency goals it does where that
            brings more.
        clock: seconds, monotonic.

    """

    def __init__(
        self,
        max_draft_tokens: int,
        max_requests: int,
        slo: LatencySlo | None = None,
        store: PersistentState | None = None,
        calibrating: bool = False,
        log_changes: bool = False,
        clock: Callable[[], float] = time.monotonic,
        confident_drafts: bool = False,
        slowest_request: float = 0.0,
        graphs: FullGraphs | None = None,
        self_calibrating: bool = False,
        adaptive_verification: bool = False,
    ) -> None:
        self.acceptance = AcceptanceModel(max(1, max_draft_tokens))
        self.costs = StepCosts(max_requests * (max_draft_tokens + 1))
        self.table = RequestTable()
        self.explorer = Explorer(self.costs, self.table)
        self.log = DecisionLog()
        self.drafting = DraftingSwitch(confident_drafts, log_changes)
        self._slo = slo
        self._calibrating = calibrating
        self._confident = confident_drafts
        listens = confident_drafts and self_calibrating and slo is None
        self._listener = Listener(self.costs, self.explorer) if listens else None
        chooses = adaptive_verification and slo is None and not calibrating
        self._verification = VerificationChoice(self.explorer.budget, slowest_request) if chooses else None
        self._slowest_request = slowest_request
        self._graphs = graphs
        self._draft_cost = FREE
        self._draft_costs = DraftCostEstimator(self.costs)
        self._random = np.random.default_rng(0)
        self._saved = SavedCosts(self.costs, store, clock) if store is not None else None
        self._expected, self._accepted = 10.0, 10.0
        """Accepted tokens that were expected and that were observed; older steps fade."""
        self._backoff: Decision | None = None
        self._backoff_until = 0
        self._backoff_cost = FREE
        """While off with the same requests, the same decision holds for some steps without being computed again."""
        self._newest_step = 0
        self._undelivered = 0
        """Steps since a granted draft was last delivered."""
        self._max_length = INITIAL_DRAFT_TOKENS

    # ---------------------------------------------------------------------------------------------- requests

    def enter(self, request: RequestState) -> None:
        """Add a request to its acceptance class."""
        index = request.index
        self.table.enter(request, self._newest_step, 0.0 if self.drafting.on else request.num_prompt_tokens)
        kind = (min(round(request.temperature * 2), 4), request.structured_output)
        self.acceptance.enter(index, kind, request.prompt_group)
        if self._slo is not None:
            self._slo.enter(index)

    # ----------------------------------------------------------------------------------------------- planning

    def get_num_draft_tokens(self, step: UpcomingStep) -> Sequence[int]:
        """The draft lengths with the most expected tokens per second, or an exploration that is worth its loss."""
        self._newest_step = step.number
        if not step.requests:
            return []
        self.explorer.budget.step()
        if self._verification is not None:
            self._verification.trims = False
        # Probes are not trimmed by the estimates that they are meant to correct.
        self._draft_cost = FREE
        batch = self.table.batch(step.requests)
        if not step.max_draft_tokens:
            self.table.prompts_unread(batch)
            plan = no_drafts(len(batch.requests))
            first = np.zeros(len(batch.requests))
            return self._record(step.number, batch, first, plan, plan.num_draft_tokens, "first token")
        repeated = self._repeat(step, batch)
        if repeated is not None:
            return repeated
        survival = self.acceptance.survival(batch.indices)
        if not len(batch.adaptive):
            plan = no_drafts(len(batch.requests), batch.fixed_lengths)
            return self._record(step.number, batch, survival[:, 0].copy(), plan, batch.fixed_lengths, "pinned")
        if not self._confident and self._max_length < survival.shape[1]:
            survival[:, self._max_length :] = 0.0
        now = self._estimate(step, batch, survival)
        if not self.costs.ready:
            plan = no_drafts(len(batch.requests))
            return self._record(step.number, batch, now.first_acceptance, plan, plan.num_draft_tokens, "learning")
        max_seconds = self._plan(now)
        trimmed = self._verification.decide(now) if self._verification is not None else ""
        if trimmed:
            most = np.full(len(batch.requests), step.max_draft_tokens)
            return self._record(step.number, batch, now.first_acceptance, now.plan, most, trimmed)
        plan, num_draft_tokens, reason = self._explore_or_follow(now, max_seconds)
        result = self._record(step.number, batch, now.first_acceptance, plan, num_draft_tokens, reason)
        if reason in ("off", "listen") and self._slo is None and batch.all_adaptive:
            self._backoff, self._backoff_until = self.log.newest_decision, step.number + BACKOFF_STEPS
            self._backoff_cost = self._draft_cost
        return result

    def _repeat(self, step: UpcomingStep, batch: Batch) -> Sequence[int] | None:
        """The last decision once more, while it was to draft nothing for the same requests a few steps ago."""
        last = self._backoff
        if (
            last is not None
            and step.number < self._backoff_until
            and not self.explorer.follow_up
            and (self._listener is None or self._listener.heard_nothing)
            and (last.batch is batch or np.array_equal(last.batch.indices, batch.indices))
        ):
            self._draft_cost = self._backoff_cost
            return self._record(
                step.number, batch, last.first_acceptance, last.plan, last.num_draft_tokens, last.reason
            )
        self._backoff = None
        return None

    def _estimate(self, step: UpcomingStep, batch: Batch, survival: Array) -> StepContext:
        """Everything that plans for this step are made with."""
        survival, first, delivery_rate, context = self.table.calibrate(batch, self._calibration_factor(), survival)
        fixed_lengths = batch.fixed_lengths
        more_rows = 0.0 if batch.all_adaptive else float(fixed_lengths[fixed_lengths >= 0].sum())
        slo = self._slo
        return StepContext(
            step.number,
            batch,
            self.costs,
            context,
            survival,
            first,
            step.max_draft_tokens,
            self._max_rows(len(batch.requests)),
            slo.max_seconds(step) if slo is not None else np.inf,
            delivery_rate,
            slo.weights(batch.indices) if slo is not None else None,
            more_rows,
            drafting_counts=not self._confident,
            graphs=self._graphs,
            bounds_delay=self._slowest_request > 0.0,
        )

    def _plan(self, now: StepContext) -> float:
        """Find the best plan that slows no request down too much; returns the longest step that allows that."""
        plan = now.best(now.survival)
        max_seconds = np.inf
        floor = self._slowest_request
        is_limited = len(now.batch.requests) > 1 and self._undelivered < MAX_UNDELIVERED_STEPS
        if floor and is_limited and (self._confident or plan.seconds * floor > plan.baseline_seconds):
            saved = self.table.saved[now.batch.indices]
            max_seconds = max_step_seconds(plan, now.survival, now.delivery_rate, floor, saved)
        if plan.seconds > max_seconds:
            now.max_seconds = min(max_seconds, now.max_seconds)
            plan = now.best(now.survival)
        now.plan = plan
        return max_seconds

    def _explore_or_follow(self, now: StepContext, max_seconds: float) -> tuple[StepPlan, Indices, str]:
        """The plan that counts, the draft tokens of this step and the reason: an exploration, or what seems best."""
        if self._calibrating:
            return now.plan, self._random_lengths(now), "calibrating"
        drafting = self.drafting.update(now, settled=self._max_length > INITIAL_DRAFT_TOKENS)
        listener = self._listener
        listens = listener is not None and listener.is_affordable(now.plan)
        # What more drafts would cost matters only once they are known to be accepted, if that is learned for nothing.
        uncertain = self.explorer.uncertain_cost(now, drafting) if drafting or not listens else None
        if uncertain is not None:
            self._limit_exploration(now, uncertain)
            return uncertain, uncertain.num_draft_tokens, "costs"
        if listener is not None and listens:
            return (now.plan, *self._listen(listener, now, drafting, max_seconds))
        if drafting:
            num_draft_tokens, reason = self.explorer.while_drafting(now)
            if self._confident and reason != "reference":
                num_draft_tokens = self._price(now, num_draft_tokens, max_seconds)
            return now.plan, num_draft_tokens, reason
        self._regain_confidence()
        trial = self.explorer.trial(now)
        if trial is not None:
            self._limit_exploration(now, trial)
            return trial, trial.num_draft_tokens, "trial"
        return (now.plan, *self.explorer.while_off(now))

    def _listen(self, listener: Listener, now: StepContext, drafting: bool, max_seconds: float) -> tuple[Indices, str]:
        """Ask for all that is found and let its confidence decide, or for nothing; and the reason."""
        num_draft_tokens = np.zeros(now.plan.num_requests, np.intp)
        if not drafting:
            self._regain_confidence()
        # The estimated acceptance of a new server is an assumption, which confidence makes unnecessary.
        reason = listener.reason(now, pays=drafting and self._max_length > INITIAL_DRAFT_TOKENS)
        if reason in ("draft", "listen"):
            num_draft_tokens += now.max_draft_tokens
            self._price(now, num_draft_tokens, max_seconds)
            if reason == "listen" and listener.is_curious():
                self._draft_cost = scaled(self._draft_cost, CURIOUS_COST)
        return num_draft_tokens, reason

    def _regain_confidence(self) -> None:
        """While nothing is drafted, confidence in the estimates returns slowly."""
        self._expected, self._accepted = 0.1 + 0.99 * self._expected, 0.1 + 0.99 * self._accepted

    def _limit_exploration(self, now: StepContext, plan: StepPlan) -> None:
        """Let a drafter with confidences deliver what the loss of an exploration was computed for, and no more.

        A price would trim it by the estimates that it is meant to correct. But a drafter that rarely delivers what it
        is granted may do so for once: at 16 requests on two cores such steps took four times as long as others.
        """
        if self._confident:
            self._draft_cost = free_up_to(max(MIN_EXPLORED, math.ceil(now.delivered(plan) + now.more_rows)))

    def _price(self, now: StepContext, num_draft_tokens: Indices, max_seconds: float) -> Indices:
        """Set the cost by which a drafter with confidences trims its drafts, and ask it for all that it can deliver."""
        max_draft_tokens = len(now.batch.adaptive) * now.max_draft_tokens
        self._draft_cost = self._draft_costs.draft_cost(
            now.plan, now.context, now.more_rows, max_draft_tokens, now.max_rows, max_seconds, self._graphs is not None
        )
        if now.delays_others:
            self._draft_cost = scaled(self._draft_cost, 1.0 + MIN_RETURN_ON_DELAY)
        if self._slo is not None or now.even_lengths:
            return num_draft_tokens
        earns_cost = (num_draft_tokens > 0) & (now.survival[:, 0] >= self._draft_cost.per_token)
        return np.where(earns_cost, now.max_draft_tokens, num_draft_tokens)

    def _max_rows(self, num_requests: int) -> float:
        """Not far beyond what was measured: the first steps grow by degrees."""
        return max(3.0 * num_requests, 2.0 * self.costs.max_measured_rows + 8)

    def draft_cost(self) -> DraftCost:
        """Cost of drafts in the step that was planned last."""
        return self._draft_cost

    def trims_verification(self) -> bool:
        """Whether vLLM may trim the drafts of the step that was planned last."""
        return self._verification is not None and self._verification.trims

    def forget(self, request_id: str) -> None:
        """A request ended."""
        if self._verification is not None:
            self._verification.forget(request_id)

    def _calibration_factor(self) -> float:
        """Accepted tokens per expected one: whichever estimates look best are too high on average."""
        return min(max((self._accepted + CALIBRATION_PRIOR) / (self._expected + CALIBRATION_PRIOR), 0.6), 1.2)

    def _random_lengths(self, now: StepContext) -> Indices:
        """Random lengths: the same for all, or each request its own, or none."""
        count = now.plan.num_requests
        longest = int(self._random.integers(0, now.max_draft_tokens + 1))
        if self._random.random() < 0.5:
            return np.full(count, longest)
        return self._random.integers(0, longest + 1, count)

    def _record(
        self,
        number: int,
        batch: Batch,
        first_acceptance: Array,
        plan: StepPlan,
        num_draft_tokens: Indices,
        reason: str,
    ) -> Sequence[int]:
        """Grant the draft tokens, fixed lengths as clients asked, and log the decision."""
        if not batch.all_adaptive and reason != "first token":
            num_draft_tokens = np.where(batch.fixed_lengths < 0, num_draft_tokens, batch.fixed_lengths)
        uncached_tokens, granted = self.table.grant(batch, num_draft_tokens, number)
        expected = (plan.tokens - plan.num_requests) / self._calibration_factor()
        self.log.add(
            Decision(
                number, reason, batch, num_draft_tokens, first_acceptance, plan, expected, granted, uncached_tokens
            )
        )
        granted_lengths: list[int] = num_draft_tokens.tolist()
        return granted_lengths

    # ------------------------------------------------------------------------------------------------ learning

    def observe(self, outcome: StepOutcome) -> None:
        """Learn acceptance, step time, and how accurate the expectations were."""
        if not outcome.requests:
            return
        batch = self.table.batch(outcome.requests)
        drafted, accepted = to_indices(outcome.drafted), to_indices(outcome.accepted)
        context, total, num_accepted = self.table.advance(batch, drafted, accepted)
        if self._slo is not None:
            self._slo.observe(batch.indices, accepted + 1)
        if not outcome.trimmed:
            self._draft_costs.observe(total)
        self._max_length = max(self._max_length, GROWTH * int(accepted.max()))
        decision = self.log.of_step(outcome.number - 1)
        if decision is not None:
            decision.set_outcome(outcome, total, num_accepted)
            if total and not decision.prompt_tokens and decision.reason not in NOT_ESTIMATED:
                self.table.save(batch, accepted, outcome.seconds, decision.plan.baseline_seconds)
            if self._verification is not None and not decision.prompt_tokens and decision.reason not in NOT_ESTIMATED:
                self._verification.observe(outcome, decision.plan)
            if total or decision.granted:
                self._undelivered = 0 if total else self._undelivered + 1
                if not outcome.trimmed:
                    self._compare(decision, batch, drafted, accepted)
        if not outcome.trimmed:  # what was not verified was not refused
            self.acceptance.observe(batch.indices, drafted, accepted)
        planned = self.log.of_step(outcome.number)
        if planned is None or not planned.granted:
            self.table.drafter_was_off(batch, accepted)
        else:
            self.table.drafter_skipped(planned.batch, planned.num_draft_tokens)
        self._observe_costs(outcome, planned, context, total)
        if self._listener is not None and decision is not None:
            self._listener.observe(decision.reason, decision.plan, total, num_accepted, context)

    def _observe_costs(self, outcome: StepOutcome, planned: Decision | None, context: float, total: int) -> None:
        if outcome.experts is not None:
            self.costs.experts.observe(outcome.experts)
        count = len(outcome.requests)
        rows = count + total
        if outcome.trimmed:
            return  # its rows are not known
        if outcome.num_scheduled_tokens != rows or outcome.seconds <= 0:
            return  # it read prompts, too, whose cost is not modelled
        # A hybrid drafter may have left its model out, or read more than was assumed, or less.
        assumed = planned.uncached_tokens if planned is not None and outcome.draft_steps else 0.0
        uncached_tokens = assumed if outcome.uncached_tokens is None else outcome.uncached_tokens
        piecewise = self._graphs is not None and not self._graphs.cover(outcome.drafted)
        # Of steps that all draft it could not be told how long drafting takes.
        draft_steps = 0 if self._listener is not None and self._listener.active else outcome.draft_steps
        features = self.costs.features(rows, context, total, draft_steps, count, uncached_tokens, piecewise)
        self.costs.observe(features, outcome.seconds)
        if self._saved is not None:
            self._saved.save_sometimes()

    def _compare(self, decision: Decision, batch: Batch, drafted: Indices, accepted: Indices) -> None:
        """Compare the outcome with what was expected."""
        planned, known, num_accepted = self.table.compare(
            decision.number, decision.batch, decision.num_draft_tokens, batch, drafted, accepted
        )
        if decision.reason in ("draft", "trial", "costs"):
            # Neither requests that have ended since nor requests that were not planned for count.
            self._expected = _MEMORY * self._expected + decision.expected_accepted * known / max(planned, 1)
            self._accepted = _MEMORY * self._accepted + num_accepted
        elif decision.reason in ("probe", "follow-up") and decision.drafted:
            expected = float((drafted > 0) @ self.acceptance.survival(batch.indices)[:, 0])
            if int(accepted.sum()) > expected + 0.5:
                self.explorer.follow_up = min(2 * int((drafted > 0).sum()), len(drafted))

    def close(self) -> None:
        """Save the costs."""
        if self._saved is not None:
            self._saved.close()

    # ----------------------------------------------------------------------------------------------- explaining

    def decisions(self, last: int, request_id: str | None = None) -> Sequence[Mapping[str, Any]]:
        """The newest decisions; see ``decision_log.Decision.to_dict``."""
        return self.log.newest(last, request_id)
