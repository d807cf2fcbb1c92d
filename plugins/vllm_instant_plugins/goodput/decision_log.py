"""The newest decisions, for ``vllm-instant explain``."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant import StepOutcome
from vllm_instant_plugins.goodput.planner import StepPlan
from vllm_instant_plugins.goodput.request_table import Batch

CAPACITY = 2048
MAX_ROWS = 8192
"""Maximum number of requests' rows that one call returns: the engine waits meanwhile."""
NOT_ESTIMATED = frozenset(("pinned", "learning", "first token"))
"""Reasons of decisions for which no step time was estimated."""
EXPLANATIONS = {
    "learning": "nothing measured yet: the first steps show how long one takes without drafts",
    "first token": "the draft model does not run while a request waits for its first token",
    "draft": "drafting yields more tokens per second",
    "draft+probe": "as draft, and one request without drafts tries one token, in case it has become predictable",
    "reference": "one step without drafts, to measure what drafting is compared with",
    "off": "no drafting: the best plan would yield fewer tokens per second",
    "listen": "drafting does not pay on average, but it is free: drafts are verified where they are likely enough",
    "probe": "off, but one request tries the drafter, in case it has become better",
    "follow-up": "the last probe was accepted more often than expected: more of it at once",
    "costs": "the time of a step with this many drafts is uncertain, and it may be the best plan: tried to learn it",
    "pinned": "all requests have draft lengths that their clients asked for",
    "trial": "off, but drafting is so nearly as good that a whole step of it is tried",
    "trimmed": "all draft the maximum and vLLM's adaptive verification trims, which brings more at this load",
    "trim trial": "a few steps in which vLLM's adaptive verification trims, to compare it with this policy's own plans",
    "calibrating": "random draft lengths, to learn how long steps take",
}


@dataclass(slots=True)
class Decision:
    """One planned step: what was known, what was chosen and why, and its outcome."""

    number: int
    reason: str
    batch: Batch
    num_draft_tokens: npt.NDArray[np.intp]
    """Draft tokens granted to each request."""
    first_acceptance: npt.NDArray[np.float64]
    """Estimated acceptance of the first draft token of each request."""
    plan: StepPlan
    """The best plan, whether or not it was chosen."""
    expected_accepted: float
    """Accepted tokens by the acceptance estimates alone, before calibration."""
    granted: int
    """Draft tokens granted in total."""
    uncached_tokens: float = 0.0
    """Tokens that the drafter must read for this step's drafts, because it was off when they came."""
    produced: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    seconds: float | None = None
    prompt_tokens: int | None = None
    """Prompt tokens that the step read besides."""

    def set_outcome(self, outcome: StepOutcome, drafted: int, accepted: int) -> None:
        """Add what came of the step."""
        self.drafted, self.accepted, self.seconds = drafted, accepted, outcome.seconds
        self.produced = accepted + len(outcome.requests)
        self.prompt_tokens = outcome.num_scheduled_tokens - len(outcome.requests) - drafted

    def to_dict(self, request_id: str | None = None) -> dict[str, Any] | None:
        """The decision as JSON types; with a request id only that request's row, None when it has none."""
        rows = [
            {
                "request": state.request_id,
                "draft_tokens": int(length),
                "acceptance": round(float(chance), 3),
            }
            for state, length, chance in zip(
                self.batch.requests, self.num_draft_tokens, self.first_acceptance, strict=True
            )
            if request_id is None or state.request_id.startswith(request_id)
        ]
        if not rows:
            return None
        return {
            "step": self.number,
            "reason": self.reason,
            "num_requests": len(self.batch.requests),
            "draft_tokens": self.granted,
            "expected": self._expected(),
            "outcome": self._outcome(),
            "requests": rows,
            "summary": self._summary(rows, of_request=request_id is not None),
            "explanation": f"{self.reason}: {EXPLANATIONS.get(self.reason, 'no further explanation')}",
        }

    def _expected(self) -> dict[str, float] | None:
        if self.reason in NOT_ESTIMATED:
            return None
        plan = self.plan
        return {
            "tokens": round(plan.tokens, 2),
            "milliseconds": round(plan.seconds * 1e3, 3),
            "milliseconds_without_drafts": round(plan.baseline_seconds * 1e3, 3),
            "gain": round(plan.gain, 3),
            "worth_from": round(plan.threshold, 3),
        }

    def _outcome(self) -> dict[str, Any] | None:
        if self.seconds is None:
            return None
        return {
            "tokens": self.produced,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "milliseconds": round(self.seconds * 1e3, 3),
            "prompt_tokens": self.prompt_tokens,
        }

    def _summary(self, rows: list[dict[str, Any]], of_request: bool) -> dict[str, str]:
        """One row of ``vllm-instant explain``; acceptance and drafts are the request's own with ``of_request``."""
        acceptance = sum(row["acceptance"] for row in rows) / len(rows)
        summary = {
            "step": str(self.number),
            "reason": self.reason,
            "requests": str(len(self.batch.requests)),
            "its acceptance" if of_request else "acceptance": "–" if self.reason == "pinned" else f"{acceptance:.0%}",
            "its drafts" if of_request else "drafts": str(rows[0]["draft_tokens"] if of_request else self.granted),
        }
        expected, outcome = self._expected(), self._outcome()
        return summary | {
            "worth from": f"{expected['worth_from']:.0%}" if expected and expected["worth_from"] < 1 else "–",
            "gain": f"{expected['gain']:.2f}×" if expected else "–",
            "expected tokens in ms": f"{expected['tokens']:.1f} in {expected['milliseconds']:.1f}" if expected else "–",
            "without drafts ms": f"{expected['milliseconds_without_drafts']:.1f}" if expected else "–",
            "actual tokens in ms": f"{outcome['tokens']} in {outcome['milliseconds']:.1f}" if outcome else "…",
            "accepted": f"{outcome['accepted']} of {outcome['drafted']}" if outcome and outcome["drafted"] else "–",
        }


class DecisionLog:
    """A ring of decisions by step number."""

    def __init__(self) -> None:
        self._ring: deque[Decision] = deque(maxlen=CAPACITY)

    @property
    def newest_decision(self) -> Decision:
        """The decision that was added last.

        Raises:
            IndexError: when there is none.

        """
        return self._ring[-1]

    def add(self, decision: Decision) -> None:
        """Keep a new decision and drop the oldest where the log is full."""
        self._ring.append(decision)

    def of_step(self, number: int) -> Decision | None:
        """The decision with this number if it is still here; the newest are found first."""
        for decision in reversed(self._ring):
            if decision.number == number:
                return decision
            if decision.number < number:
                return None
        return None

    def newest(self, last: int, request_id: str | None) -> list[dict[str, Any]]:
        """At most ``last`` decisions, the oldest first; fewer where they have more than ``MAX_ROWS`` rows."""
        found: list[dict[str, Any]] = []
        rows = 0
        for decision in reversed(self._ring):
            # Rows of other requests than the one that is asked for are only compared.
            rows += len(decision.batch.requests)
            if rows > (MAX_ROWS if request_id is None else 4 * MAX_ROWS) and decision is not self._ring[-1]:
                break
            as_dict = decision.to_dict(request_id)
            if as_dict is not None:
                found.append(as_dict)
                if len(found) >= last:
                    break
        return found[::-1]
