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
    """The finished steps among some decisions that read no prompts."""

    steps: int
    drafting: int
    """How many of them drafted or verified drafts."""
    milliseconds: float
    """How long all of them took."""
    undrafted_milliseconds: float
    """How long their tokens would have taken without drafts."""

    @property
    def speed(self) -> float:
        """Tokens a second relative to never drafting; below 1 where drafting lost."""
        return self.undrafted_milliseconds / self.milliseconds


def balance(decisions: Iterable[Mapping[str, Any]]) -> Balance | None:
    """Compare the steps that drafted, or verified what the step before had drafted, with those that did neither.

    A step without drafts gives every request a token. How long it takes with as many requests is the median of such
    steps here; where there was none, that of the nearest number of requests. Steps that read prompts are passed over,
    and those that have not finished.

    Args:
        decisions: as the server answers them, the oldest first (``vllm_instant_plugins.goodput.trace.Decision.plain``):
            the drafts of a decision are made in its step and verified in the next, whose tokens and time its outcome
            says.

    Returns:
        None when no step went without drafts.

    """
    # Of a step that was planned twice, because a request came, the later plan counts.
    decided = {decision["step"]: decision for decision in decisions}
    plain: dict[int, list[float]] = defaultdict(list)
    drafting: list[tuple[int, float, float]] = []
    for step, decision in decided.items():
        outcome, following = decision["outcome"], decided.get(step + 1)
        # Of another policy, or an earlier release, it may not be known what prompts were read.
        if outcome is None or outcome.get("prompt_tokens") != 0 or following is None:
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
    return Balance(
        steps=sum(map(len, plain.values())) + len(drafting),
        drafting=len(drafting),
        milliseconds=without + sum(taken for _, _, taken in drafting),
        undrafted_milliseconds=without + sum(tokens / requests * usual(requests) for requests, tokens, _ in drafting),
    )
