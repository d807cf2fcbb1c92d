"""The cost of drafts in one step, for drafters with confidences: in tokens that their time would yield otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant import DraftCost
from vllm_instant.interfaces.speculation import UNAFFORDABLE
from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.goodput.planner import StepCurve, StepPlan, between, first_not_below
from vllm_instant_plugins.jit import compiled

Array = npt.NDArray[np.float64]

FREE = DraftCost()
PRICED_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Numbers of draft tokens whose verification is priced."""
INITIAL_USUAL_DRAFTS = 4.0
_MEMORY = 0.95


def free_up_to(num_draft_tokens: int) -> DraftCost:
    """Return a cost of 0 for this number of draft tokens of all requests together, and a prohibitive one for more."""
    num_draft_tokens = max(1, num_draft_tokens)
    free = [(count, 0.0) for count in sorted({1, num_draft_tokens})]
    return DraftCost(verify_cost_curve=(*free, (num_draft_tokens + 1, UNAFFORDABLE)))


def scaled(draft_cost: DraftCost, factor: float) -> DraftCost:
    """Return a cost with ``factor`` times the cost of verification; what is unaffordable remains so."""
    curve = [(n, cost if cost >= UNAFFORDABLE else factor * cost) for n, cost in draft_cost.verify_cost_curve]
    return replace(
        draft_cost,
        verify_cost_curve=tuple(curve),
        per_token=factor * draft_cost.per_token,
        verify_fixed=factor * draft_cost.verify_fixed,
    )


class DraftCostEstimator:
    """Cost of the next step's drafts.

    Args:
        costs: seconds of steps.

    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._usual_drafts = INITIAL_USUAL_DRAFTS
        """Draft tokens of a step that has any, on average: the cost of one more depends on how many there are."""
        self._counts: tuple[Array, list[int]] = np.zeros(1), []

    def observe(self, num_draft_tokens: int) -> None:
        """Learn from the number of draft tokens that a step verified."""
        if num_draft_tokens:
            self._usual_drafts = _MEMORY * self._usual_drafts + (1 - _MEMORY) * num_draft_tokens

    def draft_cost(
        self,
        plan: StepPlan,
        context: float,
        more_rows: float,
        max_draft_tokens: int,
        max_rows: float,
        max_seconds: float = np.inf,
        piecewise: bool = False,
    ) -> DraftCost:
        """Cost of drafts in the next step.

        Args:
            plan: the best plan: its tokens per second are the value of time.
            context: tokens of context over all requests.
            more_rows: rows that the step has in any case, beside one per request.
            max_draft_tokens: limit for all requests together.
            max_rows: drafts that would make a step with more rows than this are unaffordable,
            max_seconds: and drafts that would make the target model take longer than this.
            piecewise: drafts of confidences differ in number, so that they cost the step its FULL CUDA graph.

        """
        costs = self._costs
        num_requests, rows = plan.num_requests, plan.num_requests + more_rows
        tokens_per_second = max(plan.tokens / plan.seconds, num_requests / plan.baseline_seconds)
        verify_seconds = costs.verify_seconds() + piecewise * costs.piecewise_seconds()
        counts, listed = self._counts_up_to(max_draft_tokens)
        of_experts = (
            costs.expert_seconds(rows + counts, num_requests) if costs.experts.counted else np.zeros(len(counts))
        )
        seconds = costs.target_seconds(rows + counts, context, requests=num_requests) + verify_seconds
        if seconds[-1] > max_seconds:
            max_rows = min(max_rows, rows + float(np.interp(max_seconds, np.maximum.accumulate(seconds), counts)))
        at_knots = costs.at_knots()
        curve = StepCurve(
            costs.knots,
            at_knots,
            at_knots,
            costs.context_seconds(context),
            verify_seconds,
            costs.draft_weights(),
        )
        verify_costs = np.empty(len(counts) - 1)
        per_token = price_drafts(
            counts,
            float(rows),
            float(max_rows),
            self._usual_drafts,
            tokens_per_second,
            curve,
            of_experts,
            verify_costs,
        )
        catch_up_fixed, catch_up_per_token = costs.catch_up_weights().tolist()
        fixed, per_row, per_step, per_step_request = costs.draft_weights().tolist()
        return DraftCost(
            verify_cost_curve=tuple(zip(listed, verify_costs.tolist(), strict=True)),
            per_token=max(0.0, per_token),
            verify_fixed=tokens_per_second * verify_seconds,
            draft_fixed=tokens_per_second * max(fixed + per_row * rows, 0.0),
            per_draft_step=tokens_per_second * max(per_step + per_step_request * num_requests, 0.0),
            catch_up_fixed=tokens_per_second * catch_up_fixed,
            catch_up_per_token=tokens_per_second * catch_up_per_token,
            baseline_step=tokens_per_second * plan.baseline_seconds / num_requests,
        )

    def _counts_up_to(self, max_draft_tokens: int) -> tuple[Array, list[int]]:
        """The numbers of draft tokens that are priced, from 0 in the array and from 1 in the list."""
        if self._counts[1][-1:] != [max_draft_tokens]:
            listed = [count for count in PRICED_COUNTS if count < max_draft_tokens] + [max_draft_tokens]
            self._counts = np.array([0, *listed], float), listed
        return self._counts


@compiled
def price_drafts(
    counts: Any,
    rows: float,
    max_rows: float,
    usual_drafts: float,
    tokens_per_second: float,
    curve: Any,
    of_experts: Any,
    verify_costs: Any,
) -> float:
    """Cost of verifying ``counts[1:]`` draft tokens beside ``rows``, in tokens, into ``verify_costs``.

    ``counts`` begins with 0; ``of_experts`` are further seconds of each of ``counts``. Returns a rough cost of one
    draft token: the highest average among half, once and twice ``usual_drafts``.
    """
    baseline, affordable, right = 0.0, 1, 0
    costs = np.zeros(len(counts))
    for i in range(len(counts)):
        all_rows = rows + counts[i]
        right = first_not_below(all_rows, curve.knots, right)
        target = between(all_rows, right, curve.knots, curve.at_knots)
        seconds = max(target + of_experts[i] + curve.context_seconds, 1e-6)
        if i == 0:
            baseline = seconds
        elif all_rows <= max_rows:
            # Opportunity cost: what the longer step's extra seconds would yield at the present speed.
            costs[i] = tokens_per_second * (seconds - baseline)
            affordable = i + 1
        else:
            costs[i] = UNAFFORDABLE
        if i > 0:
            verify_costs[i - 1] = costs[i] + tokens_per_second * curve.verify_seconds
    if affordable == 1:
        return UNAFFORDABLE
    # The curve has steps: a single slope would be too low just before one.
    known, known_costs = counts[1:affordable], costs[1:affordable]
    per_token = -np.inf
    for tokens in (0.5 * usual_drafts, usual_drafts, 2.0 * usual_drafts):
        cost = between(tokens, first_not_below(tokens, known, 0), known, known_costs)
        per_token = max(per_token, cost / tokens)
    return per_token
