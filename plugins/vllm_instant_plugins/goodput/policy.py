"""The ``goodput`` policy: for every step the draft lengths with the most expected accepted tokens a second.

It knows requests, acceptances and step times, nothing of an engine: the same object serves vLLM's synchronous and
asynchronous schedulers, the simulator and the tests.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant import DraftCost, RequestState, SpeculationPolicy, StepOutcome, UpcomingStep
from vllm_instant_plugins.goodput.acceptance import AcceptanceModel
from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.goodput.decision_log import Decision, Trace
from vllm_instant_plugins.goodput.draft_cost import FREE, Pricing
from vllm_instant_plugins.goodput.exploration import Explorer, Situation
from vllm_instant_plugins.goodput.latency_slo import LatencyGoals
from vllm_instant_plugins.goodput.planner import Choice, choose, max_step
from vllm_instant_plugins.goodput.request_kernels import believe
from vllm_instant_plugins.goodput.request_table import Batch, RequestTable, whole_numbers
from vllm_instant_plugins.state_store import PersistentState

logger = logging.getLogger("vllm.instant")

Indices = npt.NDArray[np.intp]
Array = npt.NDArray[np.float64]

SWITCH_ON_GAIN = 0.02
"""Drafting starts when this much more is expected than without; it stops when less than without is expected."""
STEADY_STEPS = 48
CLEAR_GAIN = 0.05
"""For so many steps after it started or stopped, this much of a difference is needed."""
RESTING_STEPS = 4
SAVE_SECONDS = 60.0
SAVE_OBSERVATIONS = 200
FIRST_OBSERVATIONS = 20
"""Saved as soon as so much was learned for the first time: a server that is killed at once leaves something, too."""
_FORGETTING = 0.97


class GoodputPolicy(SpeculationPolicy):
    """Chooses draft lengths by expected tokens a second.

    Args:
        max_draft_tokens: most draft tokens that a request can get.
        max_requests: most requests that decode together.
        goals: latency goals, if any.
        store: keeps what was learned about costs, if anything shall.
        calibrating: try draft lengths at random, to learn the costs of all of them, instead of choosing the best.
        log_changes: log when drafting starts or stops to pay.
        confident_drafts: the drafter says how sure it is, and its drafts are cut by ``price``: then it is asked for
            as much as it can as soon as what it delivers earns its price, however seldom that is.
        slowest_request: least speed that a request shall keep whose drafts bring it less than the longer steps cost it,
            relative to no drafts.
        clock: seconds, monotonic.

    """

    def __init__(
        self,
        max_draft_tokens: int,
        max_requests: int,
        goals: LatencyGoals | None = None,
        store: PersistentState | None = None,
        calibrating: bool = False,
        log_changes: bool = False,
        clock: Callable[[], float] = time.monotonic,
        confident_drafts: bool = False,
        slowest_request: float = 0.0,
    ) -> None:
        self.acceptance = AcceptanceModel(max(1, max_draft_tokens))
        self.costs = StepCosts(max_requests * (max_draft_tokens + 1))
        self.explorer = Explorer(self.costs)
        self.roster = RequestTable()
        self.trace = Trace()
        self.drafting = False
        """Whether drafting pays at present; changes with hysteresis."""
        self._switched_at = -STEADY_STEPS
        self.switches = 0
        """How often ``drafting`` changed."""
        self._goals = goals
        self._store = store
        self._calibrating = calibrating
        self._log_changes = log_changes
        self._confident = confident_drafts
        self._slowest = slowest_request
        self._draft_cost = FREE
        self._pricing = Pricing(self.costs)
        self._sweep = np.random.default_rng(0)
        self._clock = clock
        self._saved_at = clock()
        self._saved_observations = 0
        self._hoped, self._got = 10.0, 10.0
        """Accepted tokens that were expected and that came, recently."""
        self._resting: Decision | None = None
        self._resting_until = 0
        """While off with the same requests, the same decision holds for some steps without being worked out again."""
        self._newest_step = 0
        if store is not None:
            saved = store.load()
            if saved is not None:
                self.costs.restore(saved)

    # ---------------------------------------------------------------------------------------------- requests

    def enter(self, request: RequestState) -> None:
        """Put the request into its class."""
        index = request.index
        self.roster.enter(request, self._newest_step)
        self.explorer.enter(index, 0.0 if self.drafting else request.num_prompt_tokens)
        kind = (min(round(request.temperature * 2), 4), request.structured_output)
        self.acceptance.enter(index, kind, request.prompt_group)
        if self._goals is not None:
            self._goals.enter(index)

    # ----------------------------------------------------------------------------------------------- choosing

    def get_num_draft_tokens(self, step: UpcomingStep) -> Sequence[int]:
        """The lengths with the most expected tokens a second, or an exploration that is worth its price."""
        requests = step.requests
        count = len(requests)
        self._newest_step = step.number
        if count == 0:
            return []
        self.explorer.allowance.step()
        # What is tried in order to learn is not cut by what is believed.
        self._draft_cost = FREE
        batch = self.roster.batch(requests)
        resting = self._resting
        if (
            resting is not None
            and step.number < self._resting_until
            and not self.explorer.follow_up
            and (resting.batch is batch or np.array_equal(resting.batch.indices, batch.indices))
        ):
            return self._decide(step, batch, resting.first, resting.choice, resting.lengths, "off")
        self._resting = None
        reach = self.acceptance.reach(batch.indices)
        pins, free = batch.pins, batch.free
        if not len(free):
            choice = Choice(pins, int(pins.max()), count, 1.0, 1.0, count, 1.0)
            return self._decide(step, batch, reach[:, 0].copy(), choice, pins, "pinned")
        believed, first, yields, context = self._believe(batch, reach)
        if not self.costs.ready:
            # Nothing was measured yet; the first step shows what one costs without drafts.
            choice = Choice(np.zeros(count, np.intp), 0, count, 1.0, 1.0, count, 1.0)
            return self._decide(step, batch, first, choice, choice.lengths, "learning")
        goals = self._goals
        more_rows = 0.0 if batch.all_free else float(pins[pins >= 0].sum())
        max_rows = self._max_rows(count)
        best = functools.partial(
            choose,
            costs=self.costs,
            context=context,
            max_rows=max_rows,
            max_seconds=goals.max_seconds(step) if goals is not None else np.inf,
            weights=goals.weights(batch.indices) if goals is not None else None,
            yields=yields,
            more_rows=more_rows,
            drafting_counts=not self._confident,
        )
        choice = best(believed)
        longest = np.inf
        if self._slowest and (self._confident or choice.seconds * self._slowest > choice.off_seconds):
            longest = max_step(choice, believed, yields, self._slowest)
        if choice.seconds > longest:
            best = functools.partial(best, max_seconds=min(longest, best.keywords["max_seconds"]))
            choice = best(believed)
        if self._calibrating:
            return self._decide(step, batch, first, choice, self._any_lengths(count, step), "calibrating")
        gain = choice.return_on_drafts if self._confident else choice.gain
        trim_drafts = choice.passes > 0 and gain >= self._min_gain(step.number)
        if trim_drafts != self.drafting:
            self.drafting = trim_drafts
            self.switches += 1
            self._switched_at = step.number
            if self._log_changes:
                self._log_change(choice, first)
        now = Situation(
            step.number, batch.indices, free, context, more_rows, believed, best, choice, step.max_draft_tokens
        )
        explorer = self.explorer
        uncertain = explorer.uncertain(now, trim_drafts)
        if uncertain is not None:
            return self._decide(step, batch, first, uncertain, uncertain.lengths, "costs")
        rests = False
        if trim_drafts:
            lengths, reason = explorer.while_drafting(now)
            if self._confident and reason != "reference":
                most = len(free) * step.max_draft_tokens
                self._draft_cost = self._pricing.draft_cost(choice, context, more_rows, most, max_rows, longest)
            if self._confident and goals is None:
                # Whose drafts come true may get as much as its drafter is sure of.
                sure = (lengths > 0) & (believed[:, 0] >= self._draft_cost.per_token)
                lengths = np.where(sure, step.max_draft_tokens, lengths)
        else:
            self._hoped, self._got = 0.1 + 0.99 * self._hoped, 0.1 + 0.99 * self._got
            trial = explorer.trial(now)
            if trial is not None:
                return self._decide(step, batch, first, trial, trial.lengths, "trial")
            lengths, reason = explorer.while_off(now)
            rests = reason == "off" and goals is None and batch.all_free
        plan = self._decide(step, batch, first, choice, lengths, reason)
        if rests:
            self._resting, self._resting_until = self.trace.newest_decision, step.number + RESTING_STEPS
        return plan

    def _believe(self, batch: Batch, reach: Array) -> tuple[Array, Array, Array | None, float]:
        """What plans are made with, from the estimated chances, whose array is used again.

        Returns:
            Chances as far as such estimates have come true, the estimates of first draft tokens, the share of the
            granted tokens that the drafter delivers (None: all; a lookup often finds nothing), and tokens of context.

        """
        first, yields = np.empty(len(reach)), np.empty(len(reach))
        roster = self.roster
        context, least = believe(
            batch.indices,
            batch.pins,
            self._realism(),
            roster.context,
            roster.granted,
            roster.proposed,
            first,
            yields,
            reach,
        )
        return reach, first, None if least > 0.98 else yields, context

    def _max_rows(self, requests: int) -> float:
        """Not far beyond what was measured: the first steps go up by degrees."""
        return max(2.0 * requests, 1.5 * self.costs.largest_rows + 8)

    def draft_cost(self) -> DraftCost:
        """What drafts cost in the step that was planned last."""
        return self._draft_cost

    def _min_gain(self, number: int) -> float:
        """The gain from which drafting pays now: harder to reach when it is off, harder to leave when it is on.

        For some steps after a change only a clear difference changes it back, so that it never flaps.
        """
        recent = number - self._switched_at < STEADY_STEPS
        if self.drafting:
            return 1.0 - (CLEAR_GAIN if recent else 0.0)
        return 1.0 + (CLEAR_GAIN if recent else SWITCH_ON_GAIN)

    def _log_change(self, choice: Choice, first: Array) -> None:
        logger.info(
            "step %d, %d requests: %s. Estimated acceptance of a first draft token %.0f %%; the best plan gives "
            "%.2f times the tokens a second of no drafts (%.1f tokens in %.1f ms against %d in %.1f ms)",
            self._newest_step,
            choice.requests,
            "drafting begins" if self.drafting else "drafting ends",
            100 * float(first.mean()),
            choice.gain,
            choice.tokens,
            1e3 * choice.seconds,
            choice.requests,
            1e3 * choice.off_seconds,
        )

    def _realism(self) -> float:
        """How many accepted tokens come for each that is expected: the best-looking estimates are often lucky ones."""
        return min(max(self._got / self._hoped, 0.6), 1.2)

    def _any_lengths(self, count: int, step: UpcomingStep) -> Indices:
        """Lengths at random: the same for all, or for each request its own, or none."""
        most = int(self._sweep.integers(0, step.max_draft_tokens + 1))
        if self._sweep.random() < 0.5:
            return np.full(count, most)
        return self._sweep.integers(0, most + 1, count)

    def _decide(
        self, step: UpcomingStep, batch: Batch, first: Array, choice: Choice, lengths: Indices, reason: str
    ) -> Sequence[int]:
        if not batch.all_free:
            lengths = np.where(batch.pins < 0, lengths, batch.pins)
        missed, granted = self.explorer.drafted(batch.indices, lengths, step.number)
        hoped = (choice.tokens - choice.requests) / self._realism()
        self.trace.add(Decision(step.number, reason, batch, lengths, first, choice, hoped, granted, missed))
        plan: list[int] = lengths.tolist()
        return plan

    # ------------------------------------------------------------------------------------------------ learning

    def observe(self, outcome: StepOutcome) -> None:
        """Learn acceptance, step time, and how far to trust the expectations."""
        count = len(outcome.requests)
        if count == 0:
            return
        batch = self.roster.batch(outcome.requests)
        drafted, accepted = whole_numbers(outcome.drafted), whole_numbers(outcome.accepted)
        context, total, kept = self.roster.advance(batch, drafted, accepted)
        if self._goals is not None:
            self._goals.observe(batch.indices, accepted + 1)
        self._pricing.observe(total)
        decision = self.trace.of_step(outcome.number - 1)
        if decision is not None:
            decision.drafted, decision.accepted, decision.took = total, kept, outcome.seconds
            decision.produced = kept + count
            decision.prompt_tokens = outcome.num_scheduled_tokens - count - total
            if total or decision.granted:
                self._compare(decision, batch, drafted, accepted)
        self.acceptance.observe(batch.indices, drafted, accepted)

        planned = self.trace.of_step(outcome.number)
        if planned is None or not planned.granted:
            self.explorer.not_drafted(batch.indices, accepted)
        else:
            self.explorer.not_all_drafted(planned.batch.indices, planned.lengths)
        if outcome.experts is not None:
            self.costs.experts.observe(outcome.experts)
        rows = count + total
        if outcome.num_scheduled_tokens == rows and outcome.seconds > 0:
            # A drafter that shares the work may have left its model out, or read more than was thought, or less.
            thought = planned.missed if planned is not None and outcome.draft_steps else 0.0
            missed = thought if outcome.uncached_tokens is None else outcome.uncached_tokens
            features = self.costs.features(rows, context, total, outcome.draft_steps, count, missed)
            self.costs.observe(features, outcome.seconds)
            self._keep()

    def _compare(self, decision: Decision, batch: Batch, drafted: Indices, accepted: Indices) -> None:
        """Set what came out beside what was expected."""
        planned, known, kept = self.roster.compare(
            decision.number, decision.batch, decision.lengths, batch, drafted, accepted
        )
        if decision.reason in ("draft", "trial", "costs"):
            # Requests that have ended since do not count, nor those that were not planned for.
            self._hoped = _FORGETTING * self._hoped + decision.hoped * known / max(planned, 1)
            self._got = _FORGETTING * self._got + kept
        elif decision.reason in ("probe", "follow-up") and decision.drafted:
            hoped = float((drafted > 0) @ self.acceptance.reach(batch.indices)[:, 0])
            if int(accepted.sum()) > hoped + 0.5:
                self.explorer.follow_up = min(2 * int((drafted > 0).sum()), len(drafted))

    def _keep(self) -> None:
        """Save the costs now and then."""
        if self._store is None:
            return
        now = self._clock()
        news = self.costs.observations - self._saved_observations
        due = news >= SAVE_OBSERVATIONS and now - self._saved_at >= SAVE_SECONDS
        if due or (not self._saved_observations and news >= FIRST_OBSERVATIONS):
            self._saved_at, self._saved_observations = now, self.costs.observations
            self._store.save_aside(self.costs.state())

    def close(self) -> None:
        """Save the costs."""
        if self._store is not None and self.costs.observations > self._saved_observations:
            self._store.save(self.costs.state())

    # ----------------------------------------------------------------------------------------------- explaining

    def decisions(self, last: int, request_id: str | None = None) -> Sequence[Mapping[str, Any]]:
        """The newest decisions, see ``trace.Decision``."""
        return self.trace.newest(last, request_id)
