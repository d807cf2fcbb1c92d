"""A rule that was learned from prompts with answers of both ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_instant.escalation.learned_rule import LearnedRule
from vllm_instant.interfaces.escalation import Decision, Depth, Escalation, EscalationRequest, Question


class Learned(Escalation):
    """The escalation ``learned``.

    Args:
        rule: The rule.
        threshold: Probability that the deep answer is better from which a request goes deep.

    """

    def __init__(self, rule: LearnedRule, threshold: float) -> None:
        self._rule = rule
        self._threshold = threshold

    def decide(self, request: EscalationRequest, answer: Mapping[str, Any] | None) -> Decision | Question:
        if not request.prompt:
            return Decision(Depth.FAST, "learned: no text")
        probability = self._rule.probability(request.body)
        depth = Depth.DEEP if probability >= self._threshold else Depth.FAST
        return Decision(depth, "learned", probability)
