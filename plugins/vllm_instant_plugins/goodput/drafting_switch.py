"""Whether drafting pays at present: harder to reach when it is off, harder to leave when it is on."""

from __future__ import annotations

import logging

from vllm_instant_plugins.goodput.exploration import StepContext
from vllm_instant_plugins.goodput.planner import StepPlan

logger = logging.getLogger("vllm.instant")

SWITCH_ON_GAIN = 0.02
"""Drafting starts when this much more is expected than without; it stops when less than without is expected."""
STEADY_STEPS = 48
"""For this many steps after drafting started or stopped,"""
STEADY_GAIN = 0.05
"""this much of a difference is needed to change it back."""
MIN_RETURN_ON_DELAY = 0.2
"""Where requests are to keep their pace and drafts make the steps of several of them longer by some share, drafting
must bring at least this share of it,"""
MAX_DELAY_GAIN = 0.1
"""or this much more speed: equal speed on average is not worth unequal times between tokens."""


class DraftingSwitch:
    """On while the best plan drafts and is clearly better than none.

    Args:
        confident_drafts: drafts are trimmed by their confidence and their cost; then what is delivered must earn that.
        log_changes: log every change, with its reasons.

    """

    def __init__(self, confident_drafts: bool, log_changes: bool) -> None:
        self.on = False
        self.changes = 0
        """Number of changes so far."""
        self._changed_at = -STEADY_STEPS
        self._confident = confident_drafts
        self._log_changes = log_changes

    def update(self, now: StepContext, settled: bool) -> bool:
        """Whether drafting pays now; ``settled``: drafts were accepted already, so estimates are no assumptions."""
        plan = now.plan
        gain = plan.return_on_drafts(now.delivered(plan)) if self._confident else plan.gain
        min_gain = self._min_gain(now.number)
        if now.delays_others and not self._confident and settled:
            longer = plan.seconds / plan.baseline_seconds - 1.0
            min_gain += min(MIN_RETURN_ON_DELAY * longer, MAX_DELAY_GAIN)
        on = plan.draft_steps > 0 and gain >= min_gain
        if on != self.on:
            self.on = on
            self.changes += 1
            self._changed_at = now.number
            if self._log_changes:
                self._log(now.number, plan, float(now.first_acceptance.mean()))
        return on

    def _min_gain(self, number: int) -> float:
        """The gain from which drafting pays; for some steps after a change only a clear difference changes it back."""
        recent = number - self._changed_at < STEADY_STEPS
        if self.on:
            return 1.0 - (STEADY_GAIN if recent else 0.0)
        return 1.0 + (STEADY_GAIN if recent else SWITCH_ON_GAIN)

    def _log(self, number: int, plan: StepPlan, first_acceptance: float) -> None:
        logger.info(
            "step %d, %d requests: %s. Estimated acceptance of a first draft token %.0f %%; the best plan yields "
            "%.2f times the tokens per second of no drafts (%.1f tokens in %.1f ms against %d in %.1f ms)",
            number,
            plan.num_requests,
            "drafting begins" if self.on else "drafting ends",
            100 * first_acceptance,
            plan.gain,
            plan.tokens,
            1e3 * plan.seconds,
            plan.num_requests,
            1e3 * plan.baseline_seconds,
        )
