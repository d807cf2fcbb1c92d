"""The escalation of one API server: decides, and records what was decided."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.escalation.conversations import DeepConversations
from vllm_instant.escalation.deep_server import DeepServer, UnavailableError
from vllm_instant.escalation.metrics import EscalationMetrics
from vllm_instant.interfaces.escalation import (
    Decision,
    Depth,
    Escalation,
    EscalationOptions,
    EscalationRequest,
    Question,
)

logger = logging.getLogger("vllm.instant")

MAX_DECISIONS = 2048
MAX_REASON = 100
"""Maximum number of characters of a reason."""
CLIENTS_CHOICE = "the client's choice"
STICKY = "the conversation is deep"
FAILED = "the plugin has failed"
GUARDED = "the guard stopped the fast answer"

Ask = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Sends a request to this server; returns its answer, empty where it had none."""


@dataclass
class Outcome:
    """One request from its decision to the end of its answer."""

    request_id: str
    decision: Decision
    began: float
    decided: float
    answered_by: Depth
    failure: str = ""
    """Why the deep server did not answer, or did not answer to the end."""
    first_part: float | None = None

    @property
    def reason(self) -> str:
        """What the client is told."""
        probability = self.decision.probability
        words = (
            self.decision.reason if probability is None else f"{self.decision.reason}; probability {probability:.2f}"
        )
        return f"deep server: {self.failure}; {words}" if self.failure else words


class EscalationService:
    """Decides about the requests of one API server.

    Args:
        guarded: The plugin.
        options: The plugin's options.
        metrics: Where to count.
        deep: The deep server; None where this server is both ends.
        clock: Time in seconds.

    """

    def __init__(
        self,
        guarded: GuardedPlugin[Escalation],
        options: EscalationOptions,
        metrics: EscalationMetrics,
        deep: DeepServer | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.guarded = guarded
        self.options = options
        self.metrics = metrics
        self.deep = deep
        self.clock = clock
        self.conversations = DeepConversations()
        self._decisions: deque[dict[str, Any]] = deque(maxlen=MAX_DECISIONS)

    async def decide(self, request: EscalationRequest, choice: Depth | None, ask: Ask) -> Decision:
        """Choose the end of a request: the client's choice, then its conversation's, then the plugin's."""
        if choice is not None:
            return Decision(choice, CLIENTS_CHOICE)
        if self.options.sticky and self.conversations.is_deep(request.tenant, request.body):
            return Decision(Depth.DEEP, STICKY)
        failed = Decision(Depth.FAST, FAILED)
        found = self.guarded.call("decide", lambda plugin: _checked(plugin.decide(request, None)), _either(failed))
        if isinstance(found, Decision):
            return found
        answer: Mapping[str, Any] = {}
        try:
            answer = await asyncio.wait_for(ask(found.body), found.timeout_seconds)
        except TimeoutError:
            logger.debug("escalation: this server did not answer a question in time")
        return self.guarded.call("decide", lambda plugin: _checked_last(plugin.decide(request, answer)), failed)

    def begin(self, request_id: str, decision: Decision, began: float) -> Outcome:
        """Note a decision."""
        now = self.clock()
        self.metrics.decided(now - began)
        return Outcome(request_id, decision, began, now, decision.depth)

    def fall_back(self, outcome: Outcome, error: UnavailableError) -> None:
        """Note that the deep server does not answer, so that this one does."""
        outcome.failure, outcome.answered_by = error.kind, Depth.FAST
        self.metrics.failed(error.kind, self._is_down())
        level = logging.DEBUG if error.is_known else logging.WARNING
        logger.log(level, "Escalation: the deep server does not answer (%s); the fast answer is given", error)

    def escalate_stopped(self, outcome: Outcome) -> None:
        """Note that the guard has stopped the fast answer, of which the client has read nothing."""
        outcome.decision, outcome.answered_by = Decision(Depth.DEEP, GUARDED), Depth.DEEP

    def cut(self, outcome: Outcome) -> None:
        """Note that the deep answer was cut off after the client had read a part of it."""
        outcome.failure = "cut"
        self.metrics.failed(outcome.failure, self._is_down())
        logger.warning("Escalation: a deep answer was cut off; the client was told")

    def _is_down(self) -> bool:
        return self.deep is not None and self.deep.availability.is_down

    def first_part(self, outcome: Outcome) -> None:
        """Note that the answer begins."""
        if outcome.first_part is None:
            outcome.first_part = self.clock()
            self.metrics.began(outcome.answered_by, outcome.first_part - outcome.began)
            if outcome.answered_by is Depth.DEEP:
                self.metrics.available(self._is_down())

    def end(self, outcome: Outcome, request: EscalationRequest, usage: tuple[int, int] | None) -> None:
        """Note that the answer has ended, with the numbers of tokens of prompt and answer where they are known."""
        seconds = self.clock() - outcome.began
        self.metrics.ended(outcome.decision.depth, outcome.answered_by, seconds)
        if usage is not None:
            self.metrics.used(outcome.answered_by, *usage)
        first = outcome.first_part
        if outcome.answered_by is Depth.DEEP and self.options.sticky and first is not None:
            self.conversations.remember(request.tenant, request.body)
        probability = outcome.decision.probability
        self._decisions.append(
            {
                "request_id": outcome.request_id,
                "chosen": str(outcome.decision.depth),
                "answered_by": str(outcome.answered_by),
                "reason": outcome.decision.reason,
                "probability": "" if probability is None else round(probability, 3),
                "failure": outcome.failure,
                "decision_ms": round(1000 * (outcome.decided - outcome.began), 3),
                "first_part_ms": "" if first is None else round(1000 * (first - outcome.began), 1),
                "answer_ms": round(1000 * seconds, 1),
            }
        )

    def decisions(self, last: int) -> list[dict[str, Any]]:
        """Return the newest decisions, oldest first."""
        return list(self._decisions)[-last:]


def _either(decision: Decision) -> Decision | Question:
    return decision


def _checked(found: object) -> Decision | Question:
    if isinstance(found, Question):
        if not isinstance(found.body, Mapping):
            raise ContractError(f"the body of a Question must be a mapping, not {type(found.body).__name__}")
        return Question(dict(found.body), float(found.timeout_seconds))
    return _checked_last(found)


def _checked_last(found: object) -> Decision:
    if not isinstance(found, Decision):
        raise ContractError(f"decide() must return a Decision, not {type(found).__name__}")
    probability = None if found.probability is None else float(found.probability)
    if probability is not None and not 0 <= probability <= 1:
        raise ContractError(f"a probability must lie in 0..1, not {probability}")
    return Decision(Depth(found.depth), str(found.reason)[:MAX_REASON], probability)
