"""Estimates the speedup by drafting from the decision trace of a server (``GET /v1/instant/decisions``).

Rounds of a few seconds vary by several percent, and two processes of one kind differ for as long as they live. Steps of
one process, seconds apart, can be compared more precisely: steps with drafts with neighbouring steps without.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SpeedupEstimate:
    """Finished steps without prefill, compared with the same steps without drafts."""

    steps: int
    drafting: int
    """Number of steps that drafted or verified drafts."""
    milliseconds: float
    """Total time of all steps."""
    undrafted_milliseconds: float
    """Estimated time of the same tokens without drafts."""

    @property
    def speed(self) -> float:
        """Tokens per second relative to never drafting; below 1 where drafting lost."""
        return self.undrafted_milliseconds / self.milliseconds


def estimate_speedup(decisions: Iterable[Mapping[str, Any]]) -> SpeedupEstimate | None:
    """Compare the steps that drafted, or verified drafts of the step before, with the steps that did neither.

    A step without drafts yields one token per request. Its time for a number of requests is the median of such steps
    here, or that of the nearest number of requests. Steps with prefill and unfinished steps are excluded.

    Args:
        decisions: of any policy, the oldest first, with the keys that ``SpeculationPolicy.decisions`` names; decisions
            without these keys are skipped. The drafts of a decision are made in its step and verified in the next,
            whose tokens and time are in its outcome.

    Returns:
        None when every step had drafts.

    """
    decided = _decided(decisions)
    plain: dict[int, list[float]] = defaultdict(list)
    drafting: list[tuple[int, float, float]] = []
    for step, decision in decided.items():
        outcome, following = decision["outcome"], decided.get(step + 1)
        if following is None or not _only_decoded(outcome):
            continue
        if decision["draft_tokens"] or following["draft_tokens"]:
            drafting.append((decision["num_requests"], outcome["tokens"], outcome["milliseconds"]))
        else:
            plain[decision["num_requests"]].append(outcome["milliseconds"])
    if not plain:
        return None
    medians = {requests: statistics.median(times) for requests, times in plain.items()}

    def usual(requests: int) -> float:
        return medians[min(medians, key=lambda known: abs(known - requests))]

    without = sum(sum(times) for times in plain.values())
    return SpeedupEstimate(
        steps=sum(map(len, plain.values())) + len(drafting),
        drafting=len(drafting),
        milliseconds=without + sum(taken for _, _, taken in drafting),
        undrafted_milliseconds=without + sum(tokens / requests * usual(requests) for requests, tokens, _ in drafting),
    )


def decoding_speed(decisions: Iterable[Mapping[str, Any]], requests: int) -> float | None:
    """Tokens per second of finished steps without prefill and with ``requests`` requests; None when there is none.

    Args:
        decisions: as for ``estimate_speedup``.
        requests: number of requests that decode together.

    """
    outcomes = [
        decision["outcome"]
        for decision in _decided(decisions).values()
        if decision["num_requests"] == requests and _only_decoded(decision["outcome"])
    ]
    if not outcomes:
        return None
    return float(sum(o["tokens"] for o in outcomes) / sum(o["milliseconds"] for o in outcomes) * 1e3)


_KEYS = frozenset({"step", "num_requests", "draft_tokens", "outcome"})


def _decided(decisions: Iterable[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The decisions that describe a step, by step. Of a step that was planned twice the later plan counts."""
    return {decision["step"]: decision for decision in decisions if decision.keys() >= _KEYS}


def _only_decoded(outcome: Mapping[str, Any] | None) -> bool:
    """Whether the step has finished and read no prompts, as far as the policy says."""
    return outcome is not None and outcome.get("prompt_tokens") == 0 and outcome.keys() >= {"tokens", "milliseconds"}
