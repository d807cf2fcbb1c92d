"""The guard of one API server: builds judgments, and records what they decide."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.guard.judgment import Judgment, PromptJudgment
from vllm_instant.guard.metrics import GuardMetrics
from vllm_instant.guard.strictness import Strictness, strictness_of
from vllm_instant.guard.window import FAILED_RULE, LATE_RULE
from vllm_instant.interfaces.guard import Guard, GuardOptions, GuardRequest, Side, Verdict

audit = logging.getLogger("vllm.instant.guard")

MAX_DECISIONS = 2048
MAX_TYPED = 256
"""Maximum number of prompts whose judgment is kept while they are typed."""
EXCERPT = 200
"""Maximum number of characters of a text in an audit line."""


class GuardService:
    """Judges the texts of one API server.

    Args:
        guarded: The plugin.
        options: The plugin's options.
        metrics: Where to count.
        clock: Time in seconds.

    """

    def __init__(
        self,
        guarded: GuardedPlugin[Guard],
        options: GuardOptions,
        metrics: GuardMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.guarded = guarded
        self.options = options
        self.metrics = metrics
        self.clock = clock
        self._decisions: deque[dict[str, Any]] = deque(maxlen=MAX_DECISIONS)
        self._typed: deque[tuple[str, PromptJudgment]] = deque(maxlen=MAX_TYPED)

    def strictness(self, extra_args: Mapping[str, Any] | None) -> Strictness:
        """Return the limits of a request; those of the deployment where its own are not valid."""
        try:
            return strictness_of(self.options, extra_args)
        except ValueError:
            return strictness_of(self.options, None)

    def begin(
        self,
        side: Side,
        request_id: str,
        extra_args: Mapping[str, Any] | None,
        wake: Callable[[], None],
        is_structured: bool = False,
    ) -> Judgment:
        """Begin to judge a text."""
        self.metrics.begun(side)
        request = GuardRequest(
            request_id=request_id,
            side=side,
            extra_args=dict(extra_args or {}),
            is_structured=is_structured,
            wake=wake,
        )
        return Judgment(self.guarded, request)

    # ------------------------------------------------------------------------------------- typed prompts

    def remember_typed(self, text: str, prompt: PromptJudgment) -> None:
        """Keep the judgment of a prompt's beginning until the prompt is committed."""
        self._typed.append((text, prompt))

    def take_typed(self, text: str) -> tuple[str, PromptJudgment] | None:
        """Return the longest beginning of a prompt that is being judged, and its judgment, which is used once."""
        found = max(
            (kept for kept in self._typed if text.startswith(kept[0])), key=lambda kept: len(kept[0]), default=None
        )
        if found is not None:
            self._typed.remove(found)
        return found

    # ------------------------------------------------------------------------------------- records

    def record(
        self, action: str, request_id: str, side: Side, verdict: Verdict, excerpt: str, delay: float = 0.0
    ) -> None:
        """Count a decision against a text, keep it for ``explain --guard``, and write its audit line."""
        tier = verdict.rule if verdict.rule in (LATE_RULE, FAILED_RULE) else verdict.tier
        if action == "replace":
            self.metrics.replaced(tier, len(verdict.replacements))
        else:
            self.metrics.stopped(tier, side)
        start = verdict.start if verdict.start >= 0 else verdict.upto
        decision: dict[str, Any] = {
            "request_id": request_id,
            "action": action,
            "side": side,
            "rule": verdict.rule,
            "tier": tier or self.guarded.plugin,
            "position": start,
            "delay_ms": round(1000 * delay, 3),
            "judge_ms": round(1000 * verdict.seconds, 3),
        }
        if self.options.log_text:
            decision["text"] = excerpt[:EXCERPT]
        self._decisions.append(decision)
        digest = hashlib.sha256(request_id.encode()).hexdigest()[:12]
        shown = " ".join(f"{key}={value!r}" for key, value in decision.items() if key != "request_id")
        audit.warning("Guard: request=%s %s", digest, shown)

    def decisions(self, last: int) -> list[dict[str, Any]]:
        """Return the newest decisions, oldest first."""
        return list(self._decisions)[-last:]

    def update_measures(self) -> None:
        """Take over the plugin's own gauges."""
        measures: dict[str, float] = self.guarded.call(
            "metrics", lambda guard: {str(name): float(value) for name, value in _metrics_of(guard).items()}, {}
        )
        for name, value in measures.items():
            self.metrics.measure(name, value)


def _metrics_of(guard: Guard) -> Mapping[str, float]:
    metrics = getattr(guard, "metrics", None)
    return metrics() if metrics is not None else {}
