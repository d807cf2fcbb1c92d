"""Which steps are spent on measuring something, instead of on the best plan, and at what expected loss.

What is not done is not measured: a request without drafts does not show that it has become predictable, a drafter that
is off does not show that it has become good, and a step size that never ran has an uncertain cost. Each exploration is
weighed: its expected loss, in steps, must be within the ``ExplorationBudget``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from vllm_instant import FullGraphs
from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.goodput.planner import StepPlan, covers, plan_step
from vllm_instant_plugins.goodput.request_table import Batch, RequestTable

Indices = npt.NDArray[np.intp]
Array = npt.NDArray[np.float64]

BUDGET_PER_STEP = 0.006
"""Share of the steps that exploration may lose."""
MAX_BUDGET = 0.6
MIN_INTERVAL = 12
MAX_INTERVAL = 40
"""Steps between two explorations of one kind."""

LONG_STEP = 1.05
"""An exploration that makes the step of several requests this many times as long, or longer, delays all of them:"""
LONG_INTERVAL = 256
"""such explorations, each of which is two steps, the one that drafts and the one that verifies, come so rarely that the
99th percentile of the time between tokens has none of them."""

CURIOUS_SIGMAS = 2.0
"""A step whose cost is uncertain is tried when drafting so much would be best at this many standard deviations less,"""
CURIOUS_GAIN = 1.02
"""and this many times as good as the best plan."""
MAX_TRIAL_LOSS = 0.3
"""A whole step of drafting that is expected to lose more than this, in steps, is not tried."""
TRIAL_OPTIMISM = 2.0
"""A trial drafts what would be best if acceptance were this many times the estimate."""
REFERENCE_HORIZON = 20
"""Steps for which a measured time of a step without drafts is of use."""
MIN_REFERENCE_INTERVAL = 8
"""Steps between two steps without drafts for comparison,"""
INITIAL_REFERENCE_INTERVAL = 2
MIN_REFERENCES = 3.0
"""and while fewer steps of that size than this were measured recently."""
MAX_REFERENCE_LOSS = 0.5
"""Limit, in steps, of the expected loss of a step without drafts, whose time is uncertain when it is measured."""
MAX_PROBED_TOKENS = 4
MAX_HOPELESS_TOKENS = 2
HOPELESS = 0.1
"""Acceptance of first draft tokens below which a probe is short: the tokens behind the first are rarely compared."""


class ExplorationBudget:
    """The loss that exploration may still cause, in steps.

    Each step adds ``BUDGET_PER_STEP``, each exploration takes its expected loss. So the loss is bounded by that share
    whatever happens, cheap explorations come often and expensive ones rarely. Only the question whether a drafter that
    is off has become better may overdraw it, once per ``MAX_INTERVAL`` steps.
    """

    def __init__(self) -> None:
        self.balance = 0.0
        self._steps_since: dict[str, int] = {}
        """Steps since the last exploration of each kind."""
        self._long_debt = 0
        """Steps until the explorations with long steps were few enough."""

    def step(self) -> None:
        """Add the share of another planned step."""
        self.balance = min(self.balance + BUDGET_PER_STEP, MAX_BUDGET)
        self._long_debt = max(self._long_debt - 1, 0)
        for kind in self._steps_since:
            self._steps_since[kind] += 1

    def affords(self, kind: str, loss: float) -> bool:
        """Whether ``try_spend`` would succeed; nothing is spent."""
        return self._steps_since.get(kind, MIN_INTERVAL) >= MIN_INTERVAL and self.balance >= loss

    def may_explore(self, kind: str, saving: bool = False) -> bool:
        """Whether ``try_spend`` that ``must`` would succeed with the smallest loss; nothing is spent."""
        steps = self._steps_since.setdefault(kind, MIN_INTERVAL)
        return steps >= MAX_INTERVAL or not (saving or steps < MIN_INTERVAL or self.balance < 0.0)

    def is_due(self, kind: str) -> bool:
        """Whether ``kind`` was not explored for so long that it must be now."""
        return self._steps_since.setdefault(kind, MIN_INTERVAL) >= MAX_INTERVAL

    def try_spend(self, kind: str, loss: float, must: bool = False, saving: bool = False) -> bool:
        """Whether to explore now at an expected loss of ``loss`` steps; if so, the loss is spent.

        Args:
            kind: what is explored; each has an interval of its own.
            loss: in steps.
            must: at the latest ``MAX_INTERVAL`` steps after the last time, even if the budget becomes negative.
            saving: not earlier either: the budget is saved for something better.

        """
        steps = self._steps_since.setdefault(kind, MIN_INTERVAL)
        due = must and self.is_due(kind)
        if not due and (saving or steps < MIN_INTERVAL or self.balance < loss):
            return False
        self.spend(kind, loss)
        return True

    def spend(self, kind: str, loss: float) -> None:
        """Pay for an exploration that is done in any case."""
        # A deeper debt would forbid every exploration for longer than any condition lasts.
        self.balance = max(self.balance - max(0.0, loss), -MAX_BUDGET)
        self._steps_since[kind] = 0

    def settle(self, loss: float) -> None:
        """Account for what a step has lost, which was not known before; negative for a gain."""
        self.balance = min(max(self.balance - loss, -MAX_BUDGET), MAX_BUDGET)

    def may_be_long(self, follow_up: bool = False) -> bool:
        """Whether there were few explorations with long steps lately; one may be followed up at once."""
        return self._long_debt <= (LONG_INTERVAL if follow_up else 0)

    def was_long(self) -> None:
        """Count an exploration with a long step."""
        self._long_debt += LONG_INTERVAL

    def postpone(self, kind: str) -> None:
        """Ask again after ``MIN_INTERVAL`` steps."""
        self.spend(kind, 0.0)


@dataclass(slots=True)  # not frozen: frozen dataclasses take longer to construct
class StepContext:
    """What is known about a step that is being planned."""

    number: int
    batch: Batch
    costs: StepCosts
    context: float
    """Tokens of context over all requests."""
    survival: Array
    """Calibrated probability that each draft token and all before it are accepted, ``[requests, positions]``."""
    first_acceptance: Array
    """Estimated acceptance of each request's first draft token, before calibration."""
    max_draft_tokens: int
    max_rows: float
    max_seconds: float = np.inf
    delivery_rate: Array | None = None
    """Share of the granted draft tokens that the drafter delivers, ``[requests]``; None: all."""
    weights: Array | None = None
    """Value of a token of each request, ``[requests]``; None: 1."""
    more_rows: float = 0.0
    """Rows that the step has in any case, beside one per request."""
    drafting_counts: bool = True
    """Whether the drafter's time is part of the costs; False where it weighs that itself."""
    graphs: FullGraphs | None = None
    """Steps that run as one CUDA graph; None: there is no such difference."""
    bounds_delay: bool = False
    """Whether requests are to keep their pace, and not total speed alone counts."""
    plan: StepPlan = field(init=False)
    """The best plan, once it was found."""

    def best(self, survival: Array, sigmas: float = 0.0, must_draft: bool = False) -> StepPlan:
        """The best plan for this ``survival``; see ``plan_step``."""
        return plan_step(
            survival,
            self.costs,
            self.context,
            max_rows=self.max_rows,
            max_seconds=self.max_seconds,
            weights=self.weights,
            delivery_rate=self.delivery_rate,
            must_draft=must_draft,
            more_rows=self.more_rows,
            sigmas=sigmas,
            drafting_counts=self.drafting_counts,
            graphs=self.graphs,
        )

    def delivered(self, plan: StepPlan) -> float:
        """Draft tokens of a plan that the drafter is expected to deliver."""
        granted = plan.num_draft_tokens
        return float(granted.sum() if self.delivery_rate is None else granted @ self.delivery_rate)

    @property
    def delays_others(self) -> bool:
        """Whether a longer step delays requests that are to keep their pace."""
        return self.bounds_delay and len(self.batch.requests) > 1

    @property
    def even_lengths(self) -> list[int]:
        """Numbers of draft tokens with which a step of these requests runs as one CUDA graph, without 0."""
        if self.graphs is None or not self.batch.all_adaptive:
            return []
        return [n for n in self.graphs.lengths if n and covers(self.graphs, len(self.batch.requests), n)]

    def piecewise(self, num_draft_tokens: Indices) -> bool:
        """Whether a step that verifies these drafts runs outside of the FULL CUDA graphs that others have."""
        return self.graphs is not None and not self.graphs.cover(num_draft_tokens)


class Explorer:
    """Decides about explorations.

    Args:
        costs: seconds of steps.
        table: the live requests.

    """

    def __init__(self, costs: StepCosts, table: RequestTable) -> None:
        self.budget = ExplorationBudget()
        self.follow_up = 0
        """Requests to probe again at once, because the last probe was accepted against expectation."""
        self._costs = costs
        self._table = table
        self._last_reference = 0
        self._saving = False
        """Off, and the budget is saved for a whole step of drafting."""

    def uncertain_cost(self, now: StepContext, drafting: bool) -> StepPlan | None:
        """A plan that may be better than the best one, because the time of its step is uncertain.

        ``drafting``: the best plan drafts. Then whether drafting pays at all is the first thing to measure.
        """
        if not self.budget.affords("costs", 0.0) or (drafting and self._reference_pays(now)):
            return None
        plan = now.plan
        hopeful = now.best(now.survival, sigmas=CURIOUS_SIGMAS)
        same = np.array_equal(hopeful.num_draft_tokens, plan.num_draft_tokens)
        if same or hopeful.gain < CURIOUS_GAIN * plan.gain:
            self.budget.postpone("costs")
            return None
        rows = np.array(plan.num_requests + now.more_rows + hopeful.total_draft_tokens)
        seconds = float(self._seconds(np.array(float(hopeful.draft_steps)), rows, now))
        seconds += now.piecewise(hopeful.num_draft_tokens) * self._costs.piecewise_seconds()
        hopeful = replace(hopeful, seconds=seconds)
        loss = max(0.0, 1.0 - hopeful.gain / plan.gain)
        is_long = self._is_long(hopeful.seconds / plan.seconds, now)
        if (is_long and not self.budget.may_be_long()) or not self.budget.try_spend("costs", loss):
            return None
        if is_long:
            self.budget.was_long()
        return hopeful

    def while_drafting(self, now: StepContext) -> tuple[Indices, str]:
        """The best plan's draft tokens, or one request more, or none at all for comparison; and the reason."""
        if self.budget.affords("request", 0.0):
            probe = self._probe_beside(now)
            if probe is not None:
                return probe, "draft+probe"
        if self.is_reference_due(now):
            return np.zeros_like(now.plan.num_draft_tokens), "reference"
        return now.plan.num_draft_tokens, "draft"

    def is_reference_due(self, now: StepContext) -> bool:
        """Whether this step should run without drafts for comparison; if so, it is counted as done."""
        interval = MIN_REFERENCE_INTERVAL
        if self._costs.recent_measurements(now.plan.num_requests + now.more_rows) < MIN_REFERENCES:
            interval = INITIAL_REFERENCE_INTERVAL
        if now.number - self._last_reference >= interval and self._reference_pays(now):
            self._last_reference = now.number
            return True
        return False

    def _probe_beside(self, now: StepContext) -> Indices | None:
        """The best plan with one token for a request that gets none, so that it can show that it is predictable."""
        plan, adaptive = now.plan, now.batch.adaptive
        idle = adaptive[plan.num_draft_tokens[adaptive] == 0]
        if not len(idle):
            return None
        rows = np.array([0.0, 1.0]) + plan.num_requests
        row_seconds = float(np.diff(self._costs.target_seconds(rows, 0.0, requests=plan.num_requests))[0])
        probed = self._table.without_recent_drafts(now.batch, idle, 1)
        seconds = max(0.0, row_seconds) + self._catch_up_seconds(now.batch, probed)
        if not self.budget.try_spend("request", seconds / plan.seconds):
            return None
        num_draft_tokens = plan.num_draft_tokens.copy()
        num_draft_tokens[probed] = 1
        return num_draft_tokens

    def _reference_pays(self, now: StepContext) -> bool:
        """Whether measuring a step without drafts is worth its loss.

        A measurement is expected to change the gain by ``s``. With ``z = (gain - 1) / s``, it saves per step, where it
        shows that drafting does not pay, ``s * (phi(z) - z * Phi(-z))`` in expectation (the value of information), for
        ``REFERENCE_HORIZON`` steps. The loss of one step without drafts is ``1 - 1 / gain``.
        """
        plan = now.plan
        loss = min(1.0 - 1.0 / max(plan.gain, 1.0), MAX_REFERENCE_LOSS)
        return REFERENCE_HORIZON * self._value_of_reference(now) > loss

    def _value_of_reference(self, now: StepContext) -> float:
        """Expected saving per step by a measured time of a step without drafts; 0 where it is certain."""
        plan, costs = now.plan, self._costs
        count, rows = plan.num_requests, plan.num_requests + now.more_rows
        drafts = plan.total_draft_tokens
        steps = plan.draft_steps if now.drafting_counts else 0
        piecewise = now.piecewise(plan.num_draft_tokens), now.piecewise(np.zeros_like(plan.num_draft_tokens))
        deviation = plan.gain * costs.reference_deviation(rows, now.context, drafts, steps, count, *piecewise)
        if deviation < 1e-6:
            return 0.0
        z = (plan.gain - 1.0) / deviation
        density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return deviation * (density - z * 0.5 * math.erfc(z / math.sqrt(2)))

    def trial(self, now: StepContext) -> StepPlan | None:
        """While off: one step of drafting for all, when that shows more per loss than a probe of one request.

        It drafts what would be best if acceptance were ``TRIAL_OPTIMISM`` times the estimate.
        """
        if not self.budget.affords("trial", 0.0):
            return None
        hopeful = now.best(np.minimum(now.survival * TRIAL_OPTIMISM, 1.0), must_draft=True)
        if hopeful.gain < 1.0:  # nothing that one step may show would change the decision
            self._saving = False
            self.budget.postpone("trial")
            return None
        drafting = hopeful.num_draft_tokens > 0
        drafted = np.arange(now.survival.shape[1]) < hopeful.num_draft_tokens[:, None]
        plan = replace(hopeful, tokens=hopeful.num_requests + float(now.survival[drafted].sum()))
        catch_up = self._catch_up_seconds(now.batch, np.flatnonzero(drafting))
        loss = max(0.0, 1.0 - plan.gain + catch_up / plan.baseline_seconds)
        probed = len(now.batch.adaptive) if now.even_lengths else 1
        probe_seconds = float(self._seconds(np.array(1.0), np.array(float(plan.num_requests + probed)), now))
        loss_of_probe = probe_seconds / plan.baseline_seconds - 1.0
        shown = int(drafting.sum())
        self._saving = shown > 1 and loss <= MAX_TRIAL_LOSS and loss < shown / probed * loss_of_probe
        is_long = self._is_long(plan.seconds / plan.baseline_seconds, now)
        if is_long and not self.budget.may_be_long():
            self._saving = False
        if not self._saving:
            self.budget.postpone("trial")
            return None
        if self.budget.is_due("drafter"):
            self.budget.spend("trial", loss)  # instead of the probe that must be made now
        elif not self.budget.try_spend("trial", loss):
            return None
        self.budget.postpone("drafter")
        if is_long:
            self.budget.was_long()
        return plan

    def while_off(self, now: StepContext) -> tuple[Indices, str]:
        """No drafts, or a few for one request, to see whether the drafter has become better; and the reason.

        Where even steps run as one CUDA graph, all requests get the smallest number that has one: a single request's
        drafts would cost the whole step its graph, and all together show more.
        """
        plan, adaptive = now.plan, now.batch.adaptive
        num_draft_tokens = np.zeros(plan.num_requests, np.intp)
        follow_up, self.follow_up = self.follow_up, 0
        if not follow_up and not self.budget.may_explore("drafter", self._saving):
            return num_draft_tokens, "off"
        even_lengths = now.even_lengths
        num_probed = len(adaptive) if even_lengths else min(max(1, follow_up), len(adaptive))
        hopeless = bool(now.survival[adaptive, 0].max() < HOPELESS)
        max_probed = MAX_HOPELESS_TOKENS if hopeless else MAX_PROBED_TOKENS
        lengths = (
            np.array(even_lengths[:1]) if even_lengths else np.arange(1, min(max_probed, now.max_draft_tokens) + 1)
        )
        draft_steps: Array = lengths.astype(np.float64)
        rows = np.array([0.0, *draft_steps * num_probed]) + plan.num_requests
        seconds = self._seconds(np.array([0.0, *draft_steps]), rows, now, as_measured=True)
        baseline_seconds, seconds = float(seconds[0]), seconds[1:]
        if not even_lengths and now.graphs is not None:
            seconds = seconds + self._costs.piecewise_seconds()
        # The longest among the cheapest, since a second token that costs nothing shows more; where the first one will
        # be rejected, the shortest.
        margin, choice = (1.05, 0) if hopeless else (1.02, -1)
        cheap = int(np.flatnonzero(seconds <= seconds.min() * margin)[choice])
        probed = self._table.without_recent_drafts(now.batch, adaptive, num_probed)
        catch_up = self._catch_up_seconds(now.batch, probed)
        loss = max(0.0, (float(seconds[cheap]) + catch_up) / baseline_seconds - 1.0)
        is_long = self._is_long(1.0 + loss, now)
        if is_long and not self.budget.may_be_long(follow_up > 0):
            return num_draft_tokens, "off"
        if follow_up:
            self.budget.spend("drafter", loss)
        elif not self.budget.try_spend("drafter", loss, must=True, saving=self._saving):
            return num_draft_tokens, "off"
        if is_long:
            self.budget.was_long()
        num_draft_tokens[probed] = lengths[cheap]
        return num_draft_tokens, "follow-up" if follow_up else "probe"

    @staticmethod
    def _is_long(times: float, now: StepContext) -> bool:
        """Whether a step that takes this many times as long would delay several requests.

        Drafters with confidences deliver drafts in some steps only: there, rare explorations would find nothing.
        """
        return now.delays_others and now.drafting_counts and times >= LONG_STEP

    def _catch_up_seconds(self, batch: Batch, positions: Indices) -> float:
        """Seconds that the drafter takes to read what it missed of these requests."""
        uncached = float(self._table.uncached_tokens[batch.indices[positions]].sum())
        return self._costs.catch_up_seconds(uncached)

    def _seconds(self, draft_steps: Array, rows: Array, now: StepContext, as_measured: bool = False) -> Array:
        """Expected time of steps: of target, and with draft steps also of verification and drafter."""
        costs, num_requests = self._costs, now.plan.num_requests
        target = costs.target_seconds(rows, now.context, num_requests, as_measured)
        verify = np.where(draft_steps > 0, costs.verify_seconds(), 0.0)
        seconds: Array = target + verify + costs.draft_seconds(draft_steps, rows, num_requests)
        return seconds
