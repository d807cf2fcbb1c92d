"""The newest decisions, kept for whoever asks why."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.goodput.planner import Choice
from vllm_instant_plugins.goodput.request_table import Batch

KEPT = 2048


@dataclass(slots=True)
class Decision:
    """One planned step: what was known, what was chosen and why, and what came out."""

    number: int
    reason: str
    batch: Batch
    lengths: npt.NDArray[np.intp]
    """Draft tokens granted by request."""
    first: npt.NDArray[np.float64]
    """Estimated acceptance of the first draft token by request."""
    choice: Choice
    """The best plan, whether or not it was chosen."""
    hoped: float
    """Accepted tokens that the acceptance estimates alone promised."""
    granted: int
    """Draft tokens granted in all."""
    missed: float = 0.0
    """Tokens that the drafter has to read for this step's drafts, because it was off when they came."""
    produced: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    took: float | None = None
    prompt_tokens: int | None = None
    """Tokens of prompts that were read beside."""

    def plain(self, request_id: str | None = None) -> dict[str, Any] | None:
        """The decision as JSON types; with a request id only that request's row, None when it has none."""
        rows = [
            {
                "request": state.request_id,
                "draft_tokens": int(length),
                "acceptance": round(float(chance), 3),
            }
            for state, length, chance in zip(self.batch.requests, self.lengths, self.first, strict=True)
            if request_id is None or state.request_id.startswith(request_id)
        ]
        if not rows:
            return None
        choice = self.choice
        return {
            "step": self.number,
            "reason": self.reason,
            "num_requests": len(self.batch.requests),
            "draft_tokens": self.granted,
            "expected": {
                "tokens": round(choice.tokens, 2),
                "milliseconds": round(choice.seconds * 1e3, 3),
                "milliseconds_without_drafts": round(choice.off_seconds * 1e3, 3),
                "gain": round(choice.gain, 3),
                "worth_from": round(choice.threshold, 3),
            },
            "outcome": None
            if self.took is None
            else {
                "tokens": self.produced,
                "drafted": self.drafted,
                "accepted": self.accepted,
                "milliseconds": round(self.took * 1e3, 3),
                "prompt_tokens": self.prompt_tokens,
            },
            "requests": rows,
        }


class Trace:
    """A ring of decisions by step number."""

    def __init__(self) -> None:
        self._ring: deque[Decision] = deque(maxlen=KEPT)

    @property
    def newest_decision(self) -> Decision:
        """The one that was added last.

        Raises:
            IndexError: when none was.

        """
        return self._ring[-1]

    def add(self, decision: Decision) -> None:
        """Keep a new decision, forget the oldest."""
        self._ring.append(decision)

    def of_step(self, number: int) -> Decision | None:
        """The decision with this number if it is still here; the newest are found at once."""
        for decision in reversed(self._ring):
            if decision.number == number:
                return decision
            if decision.number < number:
                return None
        return None

    def newest(self, last: int, request_id: str | None) -> list[dict[str, Any]]:
        """At most ``last`` decisions, the oldest first."""
        found: list[dict[str, Any]] = []
        for decision in reversed(self._ring):
            plain = decision.plain(request_id)
            if plain is not None:
                found.append(plain)
                if len(found) >= last:
                    break
        return found[::-1]
