"""Asking a lookup in every step, also while drafts do not pay on average, because asking takes next to no time.

Such a drafter (``Plugin.self_calibrating``) compares its drafts with the tokens that come whether they are verified or
not, so that its confidence is right without probes: hopeless drafts that are verified for the sake of knowledge cost
their rows and show nothing new. Its confidence alone decides what is verified. Drafts that are verified while they do
not pay on average must pay for themselves: what they lose is taken from the budget of explorations.
"""

from __future__ import annotations

import numpy as np

from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.goodput.exploration import Explorer, StepContext
from vllm_instant_plugins.goodput.planner import StepPlan

MAX_LISTENED = 8
"""Limit of the draft tokens of all requests in a step where drafts do not pay on average."""
MAX_DRAFTED_STEPS = 3
"""Steps in sequence that verify such drafts; then one without drafts shows what they are compared with."""
CURIOUS_COST = 0.25
"""Once in a while verification is assumed to take this share of its estimate, which only verified drafts correct."""
MAX_SHARE = 0.01
"""Share of a step that asking may take,"""
SECONDS, SECONDS_PER_REQUEST = 1e-4, 2e-5
"""which is assumed to take this long, checks and the call of the drafter included."""


class Listener:
    """Decides whether drafts are verified although, or because, nothing is known of them but their confidence.

    Args:
        costs: seconds of steps.
        explorer: its budget pays, and it knows when a step without drafts is worth its loss.

    """

    def __init__(self, costs: StepCosts, explorer: Explorer) -> None:
        self._costs = costs
        self._explorer = explorer
        self._drafted_steps = 0
        """Steps with drafts since the last one without."""
        self.active = False
        """Whether the drafter was asked in the newest step whatever was expected of it."""

    @property
    def heard_nothing(self) -> bool:
        """Whether the newest step that was observed verified no drafts: then nothing has changed since its plan."""
        return self._drafted_steps == 0

    def is_affordable(self, plan: StepPlan) -> bool:
        """Whether asking takes next to no time relative to this step; then the listener is ``active``."""
        seconds = SECONDS + SECONDS_PER_REQUEST * plan.num_requests
        self.active = seconds <= MAX_SHARE * plan.baseline_seconds
        return self.active

    def reason(self, now: StepContext, pays: bool) -> str:
        """``draft`` or ``listen``, which ask for drafts, ``reference`` or ``off``, which do not.

        Args:
            now: the step; its limit of rows falls where drafts do not pay.
            pays: whether drafts are known to pay on average.

        """
        if pays:
            return "reference" if self._explorer.is_reference_due(now) else "draft"
        if self._explorer.budget.balance < 0.0:
            return "off"
        if self._drafted_steps >= MAX_DRAFTED_STEPS:
            return "reference"
        now.max_rows = min(now.max_rows, now.plan.num_requests + now.more_rows + MAX_LISTENED)
        return "listen"

    def is_curious(self) -> bool:
        """Whether drafts that seem too expensive should be verified in this step; if so, it is counted as done."""
        budget = self._explorer.budget
        due = budget.is_due("costs")
        if due:
            budget.postpone("costs")
        return due

    def observe(self, reason: str, plan: StepPlan, num_drafts: int, num_accepted: int, context: float) -> None:
        """Learn from a step, and account for what its drafts have lost.

        Args:
            reason: why they were made.
            plan: of the step in which they were made.
            num_drafts: draft tokens that were verified.
            num_accepted: accepted ones of these.
            context: tokens of context over all requests.

        """
        self._drafted_steps = self._drafted_steps + 1 if num_drafts else 0
        if reason == "listen" and num_drafts:
            count = plan.num_requests
            rows = np.array([0.0, num_drafts]) + count
            without, seconds = self._costs.target_seconds(rows, context, count).tolist()
            longer = max(seconds + self._costs.verify_seconds() - without, 0.0)
            self._explorer.budget.settle(longer / without - num_accepted / count)
