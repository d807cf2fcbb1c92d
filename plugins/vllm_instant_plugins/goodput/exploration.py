"""Which steps are spent on finding something out, instead of on the best plan.

Drafting or not, what is not done is not seen: a request without drafts does not show that it has become predictable, a
drafter that is off does not show that it has become good, a step size that was never run has an uncertain cost. Each
exploration is weighed: what it is expected to lose, in steps, must be within the ``ExplorationBudget``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.goodput.exploration_budget import ExplorationBudget
from vllm_instant_plugins.goodput.planner import Choice
from vllm_instant_plugins.goodput.request_kernels import grant, miss_all, miss_idle

Indices = npt.NDArray[np.intp]
Array = npt.NDArray[np.float64]

CURIOUS_SIGMAS = 2.0
"""A step whose cost is uncertain is tried when drafting so much would be best at this many standard deviations less,"""
CURIOUS_GAIN = 1.02
"""and this many times as good as the best plan."""
MAX_TRIAL_LOSS = 0.3
"""A whole step of drafting that is expected to lose more than this, in steps, is not tried."""
HOPE = 2.0
"""Such a step drafts what would be best if acceptance were this many times what is believed."""
VAGUE = 0.02
"""Relative uncertainty from which the time of a step without drafts is measured again while drafting,"""
CLEAR = 2.0
"""unless drafting is so many times as good even if that step takes ``CURIOUS_SIGMAS`` standard deviations less."""
MAX_REFERENCE_LOSS = 0.5
"""In steps; what is known so badly is not believed to lose more."""
MAX_PROBED_TOKENS = 4


@dataclass(slots=True)  # not frozen, which would take longer to make
class Situation:
    """What is known before a step is planned."""

    number: int
    indices: Indices
    """Of the requests."""
    free: Indices
    """Positions of the requests whose lengths are the policy's to choose."""
    context: float
    """Tokens of context over all requests."""
    more_rows: float
    """Rows that the step has in any case, beside one a request."""
    believed: Array
    """Chance that each draft token is reached and accepted, ``[requests, positions]``."""
    best: Callable[..., Choice]
    """``choose`` with all but the acceptance filled in."""
    choice: Choice
    """The best plan."""
    max_draft_tokens: int


class Explorer:
    """Decides about explorations, and knows when each request last drafted.

    Args:
        costs: what steps cost.

    """

    def __init__(self, costs: StepCosts) -> None:
        self.allowance = ExplorationBudget()
        self.follow_up = 0
        """Requests to probe again at once, because the last probe surprised."""
        self._costs = costs
        self._saving = False
        """Off, and the allowance is kept for a whole step of drafting."""
        self._last_drafted: Array = np.zeros(64)
        self._missed: Array = np.zeros(64)
        """Tokens that came while the drafter was off for the request: a draft model reads them before it drafts."""

    # ------------------------------------------------------------------------------------------- requests

    def enter(self, index: int, missed: float) -> None:
        """A request took ``index``; ``missed`` tokens of it will not have been read by the drafter."""
        if index >= len(self._missed):
            more = max(index + 1, 2 * len(self._missed)) - len(self._missed)
            self._last_drafted = np.pad(self._last_drafted, (0, more))
            self._missed = np.pad(self._missed, (0, more))
        self._last_drafted[index] = 0.0
        self._missed[index] = missed

    def drafted(self, indices: Indices, lengths: Indices, number: int) -> tuple[float, int]:
        """Step ``number`` grants ``lengths``; returns how many tokens the drafter must read first, and all lengths."""
        reading, granted = grant(indices, lengths, number, self._last_drafted, self._missed)
        return reading, granted

    def not_drafted(self, indices: Indices, accepted: Indices) -> None:
        """The drafter was off in a step that accepted so many tokens of each request's drafts."""
        miss_all(indices, accepted, self._missed)

    def not_all_drafted(self, indices: Indices, lengths: Indices) -> None:
        """The drafter was off in a step for those of its requests that were granted nothing."""
        miss_idle(indices, lengths, self._missed)

    # --------------------------------------------------------------------------------------- explorations

    def uncertain(self, now: Situation, drafting: bool) -> Choice | None:
        """A plan that may be better than the best one, because nobody knows well enough what its step costs.

        ``drafting``: the best plan does. Whether that pays at all is the first thing to know.
        """
        if not self.allowance.affords("costs", 0.0) or (drafting and self._min_gain(now) < 1.0):
            return None
        choice = now.choice
        hopeful = now.best(now.believed, sigmas=CURIOUS_SIGMAS)
        if hopeful.gain < CURIOUS_GAIN * choice.gain or np.array_equal(hopeful.lengths, choice.lengths):
            self.allowance.pay("costs", 0.0)  # asked again later
            return None
        rows = np.array(choice.requests + now.more_rows + hopeful.draft_tokens)
        passes = np.array(float(hopeful.passes))
        plan = replace(hopeful, seconds=float(self._seconds(passes, rows, now)))
        loss = max(0.0, 1.0 - plan.gain / choice.gain)
        return plan if self.allowance.take("costs", loss) else None

    def while_drafting(self, now: Situation) -> tuple[Indices, str]:
        """The best plan's lengths, or with a request more, or none at all for comparison; and the reason."""
        choice = now.choice
        if self.allowance.affords("request", 0.0):
            idle = now.free[choice.lengths[now.free] == 0]
            if len(idle):
                # One row more for a request that gets none, so that it can show that it has become predictable.
                rows = np.array([0.0, 1.0]) + choice.requests
                row_seconds = float(np.diff(self._costs.target_seconds(rows, 0.0, requests=choice.requests))[0])
                probed = idle[self._last_drafted[now.indices[idle]].argmin()]
                seconds = max(0.0, row_seconds) + self._reading_seconds(now.indices[[probed]])
                if self.allowance.take("request", seconds / choice.seconds):
                    lengths = choice.lengths.copy()
                    lengths[probed] = 1
                    return lengths, "draft+probe"
        if self.allowance.affords("reference", 0.0):
            loss = min(1.0 - 1.0 / max(choice.gain, 1.0), MAX_REFERENCE_LOSS)
            if self._min_gain(now) >= CLEAR:
                self.allowance.pay("reference", 0.0)  # asked again later
            elif self.allowance.take("reference", loss):
                return np.zeros_like(choice.lengths), "reference"
        return choice.lengths, "draft"

    def _min_gain(self, now: Situation) -> float:
        """The best plan's gain if a step without drafts takes as little as it may; infinite when its time is known."""
        choice = now.choice
        off = self._costs.features(choice.requests, now.context, 0, 0, choice.requests)
        seconds, deviation = self._costs.estimate(off)
        if deviation <= VAGUE * seconds:
            return float("inf")
        return choice.gain * (1.0 - CURIOUS_SIGMAS * deviation / max(seconds, 1e-6))

    def trial(self, now: Situation) -> Choice | None:
        """While off: one step of drafting for all, when that shows more for what it loses than probing one request.

        It drafts what would be right if acceptance were somewhat better than believed.
        """
        if not self.allowance.affords("trial", 0.0):
            return None
        hopeful = now.best(np.minimum(now.believed * HOPE, 1.0), must_draft=True)
        if hopeful.gain < 1.0:  # nothing that one step may show would change the decision
            self._saving = False
            self.allowance.pay("trial", 0.0)  # asked again later
            return None
        drafting = hopeful.lengths > 0
        reached = np.arange(now.believed.shape[1]) < hopeful.lengths[:, None]
        plan = replace(hopeful, tokens=hopeful.requests + float(now.believed[reached].sum()))
        reading = self._reading_seconds(now.indices[drafting])
        loss = max(0.0, 1.0 - plan.gain + reading / plan.off_seconds)
        of_probe = float(self._seconds(np.array(1.0), np.array(plan.requests + 1.0), now)) / plan.off_seconds - 1.0
        shown = int(drafting.sum())
        self._saving = shown > 1 and loss <= MAX_TRIAL_LOSS and loss < shown * of_probe
        if not self._saving:
            self.allowance.pay("trial", 0.0)  # asked again later
            return None
        if self.allowance.due("drafter"):
            self.allowance.pay("trial", loss)  # instead of the probe that must be made now
        elif not self.allowance.take("trial", loss):
            return None
        self.allowance.pay("drafter", 0.0)
        return plan

    def while_off(self, now: Situation) -> tuple[Indices, str]:
        """No drafts, or a few for one request, to see whether the drafter has become better; and the reason."""
        choice = now.choice
        lengths = np.zeros(choice.requests, np.intp)
        follow_up, self.follow_up = self.follow_up, 0
        if not follow_up and not self.allowance.may("drafter", self._saving):
            return lengths, "off"
        probed = min(max(1, follow_up), len(now.free))
        trials = np.arange(1, min(MAX_PROBED_TOKENS, now.max_draft_tokens) + 1)
        passes: Array = trials.astype(np.float64)
        seconds = self._seconds(passes, choice.requests + passes * probed, now)
        # The longest of the cheapest: a second token that costs nothing tells more.
        cheap = int(np.flatnonzero(seconds <= seconds.min() * 1.02)[-1])
        longest_ago = now.free[np.argsort(self._last_drafted[now.indices[now.free]], kind="stable")[:probed]]
        reading = self._reading_seconds(now.indices[longest_ago])
        loss = max(0.0, (float(seconds[cheap]) + reading) / choice.off_seconds - 1.0)
        if follow_up:
            self.allowance.pay("drafter", loss)
        elif not self.allowance.take("drafter", loss, must=True, saving=self._saving):
            return lengths, "off"
        lengths[longest_ago] = trials[cheap]
        return lengths, "follow-up" if follow_up else "probe"

    def _reading_seconds(self, indices: Indices) -> float:
        """What the drafter takes to read what it missed of these requests."""
        return self._costs.resuming_seconds(float(self._missed[indices].sum()))

    def _seconds(self, passes: Array, rows: Array, now: Situation) -> Array:
        """Expected time of steps with drafts: of target, verification and drafter."""
        target = (
            self._costs.target_seconds(rows, now.context, requests=len(now.indices)) + self._costs.verifying_seconds()
        )
        return target + self._costs.drafting_seconds(passes, rows, now.choice.requests)
