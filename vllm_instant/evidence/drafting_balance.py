"""What drafting gained or lost in the steps that a server explains (``GET /v1/instant/decisions``).

Turns of a few seconds scatter by several percent, and two processes of one kind differ for as long as they live. Steps
of one process, seconds apart, can be compared more closely: a step that drafted with those beside it that did not.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Balance:
    """The finished steps among some decisions."""

    steps: int
    drafting: int
    """How many of them had draft tokens granted."""
    milliseconds: float
    """How long all of them took."""
    undrafted_milliseconds: float
    """How long their tokens would have taken without drafts."""

    @property
    def speed(self) -> float:
        """Tokens a second relative to never drafting; below 1 where drafting lost."""
        return self.undrafted_milliseconds / self.milliseconds


def balance(decisions: Iterable[Mapping[str, Any]]) -> Balance | None:
    """Compare the steps that drafted with those that did not.

    A step without drafts gives every request a token. How long it takes with as many requests is the median of such
    steps here; where there was none, that of the nearest number of requests.

    Args:
        decisions: as the server answers them (``vllm_instant_plugins.goodput.trace.Decision.plain``); those whose steps
            have not finished are passed over.

    Returns:
        None when no step went without drafts.

    """
    plain: dict[int, list[float]] = defaultdict(list)
    drafting: list[tuple[int, float, float]] = []
    for decision in decisions:
        outcome = decision["outcome"]
        if outcome is None:
            continue
        if decision["draft_tokens"]:
            drafting.append((decision["num_requests"], outcome["tokens"], outcome["milliseconds"]))
        else:
            plain[decision["num_requests"]].append(outcome["milliseconds"])
    if not plain:
        return None

    medians = {requests: statistics.median(times) for requests, times in plain.items()}

    def usual(requests: int) -> float:
        return medians[min(medians, key=lambda known: abs(known - requests))]

    without = sum(sum(times) for times in plain.values())
    return Balance(
        steps=sum(map(len, plain.values())) + len(drafting),
        drafting=len(drafting),
        milliseconds=without + sum(taken for _, _, taken in drafting),
        undrafted_milliseconds=without + sum(tokens / requests * usual(requests) for requests, tokens, _ in drafting),
    )
