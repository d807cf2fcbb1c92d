"""When vLLM's adaptive verification decides what is verified, in place of this policy's plan.

With ``enable_adaptive_verification`` vLLM drafts the maximum for every request and verifies the tokens with the highest
survival probability, by the draft model's confidence. That is better informed than a plan made before drafting, but
drafts in full: published measurements (vLLM pull requests 52228 and 52362) show +50 % of the tokens per second at 256
clients, and 5 to 20 % less than a fixed number at 4 to 32. So which of both is better is measured here, at each load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_instant import RequestState, StepOutcome
from vllm_instant_plugins.goodput.exploration import ExplorationBudget, StepContext
from vllm_instant_plugins.goodput.planner import StepPlan

MIN_REQUESTS = 32
"""With fewer requests nothing is trimmed, nor tried."""
BLOCK = 3
"""Steps that a trial of the other way takes."""
MIN_STEPS = 9
"""Measured steps of both ways, at a load, from which they are compared."""
ADVANTAGE = 0.03
"""How much better the other way must be to be taken."""
ASSUMED_LOSS = 0.15
"""Expected loss per step of a way that was not measured yet."""
TRIAL_INTERVAL = 64
"""Minimum number of steps between two trials, once both ways were measured."""
SIGMAS = 3.0
"""Standard errors by which a request must be slower than its bound, over at least ``MIN_STEPS`` steps."""
_MEMORY = 0.98

TRIMMED, OWN = "trimmed", "own"


@dataclass
class _Average:
    """A mean in which older values fade, of values around 1."""

    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.weight = _MEMORY * self.weight + 1.0
        self.total = _MEMORY * self.total + value
        self.squares = _MEMORY * self.squares + value * value

    @property
    def mean(self) -> float:
        return self.total / self.weight

    def upper(self, sigmas: float) -> float:
        """The mean and this number of standard errors more."""
        variance = max(0.0, self.squares / self.weight - self.mean**2)
        return self.mean + sigmas * math.sqrt(variance / self.weight)


class VerificationChoice:
    """Chooses, step by step, whether vLLM trims.

    Args:
        budget: pays for trials.
        slowest_request: lower bound on the speed of each request, relative to no drafts.

    """

    def __init__(self, budget: ExplorationBudget, slowest_request: float) -> None:
        self.trims = False
        """The choice for the step that was planned last."""
        self._budget = budget
        self._floor = slowest_request
        self._chosen: dict[int, str] = {}
        """The better way at each load."""
        self._speeds: dict[tuple[int, str], _Average] = {}
        """Tokens per second of both ways relative to no drafts, by load."""
        self._paces: dict[str, _Average] = {}
        """Of requests in trimmed steps, relative to no drafts, by id."""
        self._trial_steps = 0
        """Steps that the running trial still takes."""
        self._last_trial = -TRIAL_INTERVAL

    def decide(self, now: StepContext) -> str:
        """Choose for this step; returns the reason, empty where this policy's own plan counts."""
        self.trims = False
        if len(now.batch.requests) < MIN_REQUESTS or not now.batch.all_adaptive:
            self._trial_steps = 0
            return ""
        load = _load(now.plan)
        chosen = self._better(load, now.batch.requests)
        other = OWN if chosen == TRIMMED else TRIMMED
        if self._trial_steps:
            self._trial_steps -= 1
            chosen, is_trial = other, True
        else:
            is_trial = self._is_due(load, chosen, other, now)
            if is_trial:
                chosen, self._trial_steps = other, BLOCK - 1
        self.trims = chosen == TRIMMED
        if not self.trims:
            return ""
        return "trim trial" if is_trial else "trimmed"

    def observe(self, outcome: StepOutcome, plan: StepPlan) -> None:
        """Learn from a step that read no prompts; ``plan``: this policy's own plan for it."""
        count = len(outcome.requests)
        if count < MIN_REQUESTS or count != plan.num_requests or outcome.seconds <= 0:
            return
        times = outcome.seconds / plan.baseline_seconds
        speed = (1.0 + sum(outcome.accepted) / count) / times
        self._speeds.setdefault((_load(plan), TRIMMED if outcome.trimmed else OWN), _Average()).add(speed)
        if outcome.trimmed:
            for request, number in zip(outcome.requests, outcome.accepted, strict=True):
                self._paces.setdefault(request.request_id, _Average()).add((1.0 + number) / times)

    def forget(self, request_id: str) -> None:
        """A request ended."""
        self._paces.pop(request_id, None)

    def _better(self, load: int, requests: Sequence[RequestState]) -> str:
        chosen = self._chosen.get(load, OWN)
        own, trimmed = self._speeds.get((load, OWN)), self._speeds.get((load, TRIMMED))
        if own is not None and trimmed is not None and min(own.weight, trimmed.weight) >= MIN_STEPS:
            advantage = trimmed.mean / own.mean - 1.0
            if chosen == OWN and advantage > ADVANTAGE:
                chosen = TRIMMED
            elif chosen == TRIMMED and advantage < 0.0:
                chosen = OWN
            self._chosen[load] = chosen
        # Not a choice that lasts: the request that is slowed down may end soon.
        return OWN if chosen == TRIMMED and self._slows_down(requests) else chosen

    def _slows_down(self, requests: Sequence[RequestState]) -> bool:
        """Whether some request is certainly slower than its bound where vLLM trims."""
        if not self._floor:
            return False
        known = (self._paces.get(request.request_id) for request in requests)
        return any(
            pace is not None and pace.weight >= MIN_STEPS * _MEMORY**MIN_STEPS and pace.upper(SIGMAS) < self._floor
            for pace in known
        )

    def _is_due(self, load: int, chosen: str, other: str, now: StepContext) -> bool:
        """Whether the other way is tried from now on, for ``BLOCK`` steps; if so, its expected loss is spent."""
        if other == TRIMMED and self._slows_down(now.batch.requests):
            return False
        best, tried = self._speeds.get((load, chosen)), self._speeds.get((load, other))
        if best is None or best.weight < MIN_STEPS:
            return False
        if tried is None or tried.weight < MIN_STEPS:
            loss = ASSUMED_LOSS
        elif now.number - self._last_trial < TRIAL_INTERVAL:
            return False
        else:
            loss = max(0.0, 1.0 - tried.mean / best.mean)
        if not self._budget.try_spend("verification", BLOCK * loss):
            return False
        self._last_trial = now.number
        return True


def _load(plan: StepPlan) -> int:
    """Numbers of requests up to twice as large count as the same load."""
    return plan.num_requests.bit_length()
