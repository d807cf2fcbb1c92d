"""What drafts cost, told to drafters that say how sure they are: in tokens that the time would bring otherwise."""

from __future__ import annotations

import numpy as np

from vllm_instant import DraftPrice
from vllm_instant_plugins.goodput.choice import Choice
from vllm_instant_plugins.goodput.costs import StepCosts

FREE = DraftPrice()
PRICED_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Numbers of draft tokens whose verification is priced."""
UNAFFORDABLE = 1e6
"""Tokens that nothing is expected to bring."""
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

    def observe(self, drafted: int) -> None:
        """A step verified so many draft tokens."""
        if drafted:
            self._usual = _MEMORY * self._usual + (1 - _MEMORY) * drafted

    def price(self, best: Choice, context: float, more_rows: float, most: int, most_rows: float) -> DraftPrice:
        """What drafts cost in the next step.

        Args:
            best: the best plan: its speed is what time is worth.
            context: tokens of context over all requests.
            more_rows: rows that the step has in any case, beside one a request.
            most: most draft tokens that there can be.
            most_rows: steps with more rows than this shall not be run.

        """
        costs = self._costs
        rate = max(best.tokens / best.seconds, best.requests / best.off_seconds)
        counts = np.array([count for count in PRICED_COUNTS if count < most] + [most])
        rows = best.requests + more_rows + np.concatenate([[0.0], counts])
        seconds = costs.target_seconds(rows, context, requests=best.requests)
        extra = rate * (seconds[1:] - seconds[0])
        extra[rows[1:] > most_rows] = UNAFFORDABLE
        verifying = rate * costs.verifying_seconds()
        # Roughly: the dearest of the usual number of drafts, half and twice as many.
        usual = self._usual * np.array([0.5, 1.0, 2.0])
        affordable = extra < UNAFFORDABLE
        rough = np.interp(usual, counts[affordable], extra[affordable]) / usual if affordable.any() else extra[:1]
        some, each_row, each, each_request = costs.drafting_weights()
        return DraftPrice(
            batch=tuple(zip(counts.tolist(), (extra + verifying).tolist(), strict=True)),
            row=max(0.0, float(rough.max())),
            verifying=verifying,
            drafting=rate * max(float(some + each_row * rows[0]), 0.0),
            draft_pass=rate * max(float(each + each_request * best.requests), 0.0),
            step=rate * best.off_seconds,
        )
