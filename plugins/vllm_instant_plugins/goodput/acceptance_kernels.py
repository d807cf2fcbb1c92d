"""The inner loops of the acceptance model, compiled.

Each function is the plain statement of what its caller documents; arrays that are written to come last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_instant_plugins.jit import compiled


@compiled
def reach_of(
    indices: Any, hits: Any, trials: Any, class_of: Any, class_estimate: Any, prior_weight: float, reach: Any
) -> None:
    """Chance that each draft token and all before it are accepted, by request."""
    for i in range(len(indices)):
        index = indices[i]
        chance = 1.0
        for j in range(reach.shape[1]):
            prior = class_estimate[class_of[index], j]
            chance *= (hits[index, j] + prior_weight * prior) / (trials[index, j] + prior_weight)
            reach[i, j] = chance


@compiled
def learn_requests(
    indices: Any,
    drafted: Any,
    accepted: Any,
    memory: float,
    idle_memory: float,
    class_of: Any,
    trials: Any,
    hits: Any,
    count: Any,
    class_trials: Any,
    class_hits: Any,
) -> int:
    """Add one step's observations to the requests, and sum them up by class; returns how many requests drafted."""
    positions = trials.shape[1]
    count[:], class_trials[:], class_hits[:] = 0.0, 0.0, 0.0
    drafting = 0
    for i in range(len(indices)):
        index = indices[i]
        if drafted[i] == 0:
            for j in range(positions):
                trials[index, j] *= idle_memory
                hits[index, j] *= idle_memory
            continue
        drafting += 1
        row = class_of[index]
        kept = min(accepted[i], drafted[i])
        # The token after the accepted ones was tried and refused; what follows was never looked at.
        tried = min(drafted[i], kept + 1)
        count[row] += 1.0
        for j in range(positions):
            was_tried, was_hit = 1.0 if j < tried else 0.0, 1.0 if j < kept else 0.0
            trials[index, j] = trials[index, j] * memory + was_tried
            hits[index, j] = hits[index, j] * memory + was_hit
            class_trials[row, j] += was_tried
            class_hits[row, j] += was_hit
    return drafting


@compiled
def learn_classes(
    parent: Any,
    kinds: int,
    memory: float,
    short_memory: float,
    sigmas: float,
    count: Any,
    trials: Any,
    hits: Any,
    class_trials: Any,
    class_hits: Any,
    short_trials: Any,
    short_hits: Any,
    changed: Any,
) -> int:
    """Add a step's observations by class to the classes and those above them; ``count`` then says which were touched.

    Row 0 is everything, rows up to ``kinds`` are kinds, those behind them belong to ``parent``. ``changed`` gets those
    whose short memory contradicts the long one by more than ``sigmas``; returns how many.
    """
    positions = trials.shape[1]
    for row in range(len(count) - 1, 0, -1):
        if count[row] > 0.0:
            above = parent[row] if row > kinds else 0
            count[above] += count[row]
            for j in range(positions):
                trials[above, j] += trials[row, j]
                hits[above, j] += hits[row, j]
    found = 0
    for row in range(len(count)):
        if count[row] > 0.0:
            left = memory ** count[row]
            for j in range(positions):
                class_trials[row, j] = class_trials[row, j] * left + trials[row, j]
                class_hits[row, j] = class_hits[row, j] * left + hits[row, j]
            # Many observations of one step count as a few for the short memory, or it would not be short.
            left, weight = short_memory ** count[row], min(1.0, 8.0 / count[row])
            short_trials[row] = short_trials[row] * left + trials[row, 0] * weight
            short_hits[row] = short_hits[row] * left + hits[row, 0] * weight
            tried, long_tried = short_trials[row], class_trials[row, 0]
            long = min(max(class_hits[row, 0] / max(long_tried, 1e-9), 0.02), 0.98)
            surprising = abs(short_hits[row] - tried * long) > sigmas * np.sqrt(tried * long * (1 - long))
            if surprising and tried >= 2 and long_tried >= 2 * tried:
                changed[found] = row
                found += 1
    return found


@compiled
def estimate_class(
    row: int, trials: Any, hits: Any, parent: Any, prior_weight: float, optimism: float, estimate: Any
) -> None:
    """A class's estimates from what it showed and its parent's, which must be up to date."""
    above = parent[row]
    for j in range(estimate.shape[1]):
        if j == 0:
            prior = optimism if row == 0 else estimate[above, 0]
        elif row == 0:
            prior = estimate[row, j - 1]
        else:
            falls = estimate[above, j] / max(estimate[above, j - 1], 1e-3)
            prior = min(1.0, estimate[row, j - 1] * falls)
        estimate[row, j] = (hits[row, j] + prior_weight * prior) / (trials[row, j] + prior_weight)


@compiled
def refresh_classes(
    count: Any,
    kinds: int,
    most: int,
    trials: Any,
    hits: Any,
    parent: Any,
    prior_weight: float,
    optimism: float,
    stale: Any,
    estimate: Any,
) -> None:
    """Bring the estimates of classes up to date: all up to row ``kinds``, and ``most`` of those behind them.

    ``count`` says which have learned something, ``stale`` since when others wait (0: up to date); they take turns.
    """
    newest = stale.max()
    for row in range(len(count)):
        if count[row] > 0.0 and stale[row] == 0:
            newest += 1
            stale[row] = newest
    narrow = stale[kinds + 1 :]
    waiting = np.sort(narrow[narrow > 0])
    latest = waiting[min(most, len(waiting)) - 1] if len(waiting) else 0
    for row in range(len(count)):
        # Parents have the lowest numbers and go first.
        if stale[row] > 0 and (row <= kinds or stale[row] <= latest):
            estimate_class(row, trials, hits, parent, prior_weight, optimism, estimate)
            stale[row] = 0
