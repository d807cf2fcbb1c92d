"""The inner loops over a step's requests, compiled: what array operations would take many calls for.

Arrays that are written to come last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_instant_plugins.jit import compiled


@compiled
def believe(
    indices: Any,
    pins: Any,
    realism: float,
    context: Any,
    granted: Any,
    proposed: Any,
    first: Any,
    yields: Any,
    reach: Any,
) -> tuple[float, float]:
    """Turn ``reach`` into what plans are made with: as realistic as it proved, and nothing where the length is pinned.

    Writes down what was estimated of ``first`` draft tokens, and the share of granted tokens that the drafter delivers.
    Returns the tokens of context and the least of these shares.
    """
    tokens, least = 0.0, np.inf
    for i in range(len(indices)):
        index = indices[i]
        tokens += context[index]
        yields[i] = proposed[index] / granted[index]
        least = min(least, yields[i])
        for j in range(reach.shape[1]):
            chance = reach[i, j] if pins[i] < 0 else 0.0
            if j == 0:
                first[i] = chance
            reach[i, j] = min(chance * realism, 1.0)
    return tokens, least


@compiled
def grant(indices: Any, lengths: Any, number: int, last_drafted: Any, missed: Any) -> tuple[float, int]:
    """Who gets any draft tokens drafts in step ``number``; returns what the drafter missed of them, and all lengths."""
    reading, granted = 0.0, 0
    for i in range(len(indices)):
        if lengths[i] > 0:
            index = indices[i]
            granted += lengths[i]
            last_drafted[index] = number
            reading += missed[index]
            missed[index] = 0.0
    return reading, granted


@compiled
def miss_all(indices: Any, accepted: Any, missed: Any) -> None:
    """The drafter misses what these requests got in a step: their accepted tokens and one more."""
    for i in range(len(indices)):
        missed[indices[i]] += accepted[i] + 1


@compiled
def miss_idle(indices: Any, lengths: Any, missed: Any) -> None:
    """The drafter misses the token of each request that was granted no drafts."""
    for i in range(len(indices)):
        if lengths[i] == 0:
            missed[indices[i]] += 1


@compiled
def advance(indices: Any, drafted: Any, accepted: Any, context: Any) -> tuple[float, int, int]:
    """Each request has its accepted tokens and one more; returns the context before, drafted and accepted tokens."""
    tokens, total, kept = 0.0, 0, 0
    for i in range(len(indices)):
        index = indices[i]
        tokens += context[index]
        context[index] += accepted[i] + 1
        total += drafted[i]
        kept += accepted[i]
    return tokens, total, kept


@compiled
def compare_drafts(
    number: int,
    planned: Any,
    lengths: Any,
    indices: Any,
    drafted: Any,
    accepted: Any,
    entered: Any,
    pins: Any,
    granted: Any,
    proposed: Any,
) -> tuple[int, int, int]:
    """``RequestTable.compare``."""
    planned_free, known_free, kept = 0, 0, 0
    plan = np.zeros(len(pins), np.intp)
    for i in range(len(planned)):
        plan[planned[i]] = lengths[i]
        planned_free += pins[planned[i]] < 0
    for i in range(len(indices)):
        index = indices[i]
        known = entered[index] < number
        asked = max(plan[index], drafted[i]) if known else drafted[i]
        if asked > 0:
            granted[index] = granted[index] * 0.9 + asked
            proposed[index] = proposed[index] * 0.9 + drafted[i]
        if pins[index] < 0:
            known_free += known
            kept += accepted[i]
    return planned_free, known_free, kept
