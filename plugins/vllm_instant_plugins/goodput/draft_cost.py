"""What drafts cost, told to drafters that say how sure they are: in tokens that the time would bring otherwise."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_instant import DraftCost
from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.goodput.plan_kernels import price_drafts
from vllm_instant_plugins.goodput.planner import Choice

Array = npt.NDArray[np.float64]

FREE = DraftCost()
PRICED_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Numbers of draft tokens whose verification is priced."""
FIRST_DRAFTS = 4.0
_MEMORY = 0.95


class Pricing:
    """Prices of the next step's drafts.

    Args:
        costs: what steps cost.

    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._usual = FIRST_DRAFTS
        """Draft tokens of a step that has any: what one more costs depends on how many there are."""
        self._counts: tuple[Array, list[int]] = np.zeros(1), []

    def observe(self, drafted: int) -> None:
        """A step verified so many draft tokens."""
        if drafted:
            self._usual = _MEMORY * self._usual + (1 - _MEMORY) * drafted

    def draft_cost(
        self,
        best: Choice,
        context: float,
        more_rows: float,
        most: int,
        max_rows: float,
        max_seconds: float = np.inf,
    ) -> DraftCost:
        """What drafts cost in the next step.

        Args:
            best: the best plan: its speed is what time is worth.
            context: tokens of context over all requests.
            more_rows: rows that the step has in any case, beside one a request.
            most: most draft tokens that there can be.
            max_rows: steps with more rows than this shall not be run,
            max_seconds: nor steps whose target takes longer.

        """
        costs = self._costs
        requests, rows = best.requests, best.requests + more_rows
        rate = max(best.tokens / best.seconds, requests / best.off_seconds)
        counts, listed = self._counts_up_to(most)
        verifying = rate * costs.verifying_seconds()
        of_experts = costs.expert_seconds(rows + counts, requests) if costs.experts.counted else np.zeros(len(counts))
        seconds = costs.target_seconds(rows + counts, context, requests=requests) + costs.verifying_seconds()
        if seconds[-1] > max_seconds:
            max_rows = min(max_rows, rows + float(np.interp(max_seconds, np.maximum.accumulate(seconds), counts)))
        batch = np.empty(len(counts) - 1)
        rough = price_drafts(
            counts,
            float(rows),
            float(max_rows),
            self._usual,
            rate,
            verifying,
            costs.context_seconds(context),
            of_experts,
            costs.knots,
            costs.at_knots(),
            batch,
        )
        resuming, missed_token = costs.resuming_weights().tolist()
        some, each_row, each, each_request = costs.drafting_weights().tolist()
        return DraftCost(
            verify_cost_curve=tuple(zip(listed, batch.tolist(), strict=True)),
            per_token=max(0.0, rough),
            verify_fixed=verifying,
            draft_fixed=rate * max(some + each_row * rows, 0.0),
            per_draft_step=rate * max(each + each_request * requests, 0.0),
            catch_up_fixed=rate * resuming,
            catch_up_per_token=rate * missed_token,
            baseline_step=rate * best.off_seconds / requests,
        )

    def _counts_up_to(self, most: int) -> tuple[Array, list[int]]:
        """The numbers of draft tokens that are priced, from 0 in the array and from 1 in the list."""
        if self._counts[1][-1:] != [most]:
            listed = [count for count in PRICED_COUNTS if count < most] + [most]
            self._counts = np.array([0, *listed], float), listed
        return self._counts
