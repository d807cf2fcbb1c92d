"""The compiled inner loops of the acceptance model. Arrays that are written come last."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_instant_plugins.jit import compiled


@compiled
def estimate_survival(
    indices: Any,
    hits: Any,
    trials: Any,
    class_of: Any,
    class_estimate: Any,
    class_alike: Any,
    weak_prior: float,
    strong_prior: float,
    survival: Any,
) -> None:
    """Probability that each draft token and all before it are accepted, by request."""
    for i in range(len(indices)):
        index = indices[i]
        row = class_of[index]
        alike = 1.0 / (1.0 + np.exp(-class_alike[row]))
        chance = 1.0
        for j in range(survival.shape[1]):
            hit, tried, prior = hits[index, j], trials[index, j], class_estimate[row, j]
            # Posterior mean of a Bernoulli rate under a Beta prior that counts as a number of observations, averaged
            # over the two priors; survival of position j is the product of the conditional rates up to j.
            own = (hit + weak_prior * prior) / (tried + weak_prior)
            shared = (hit + strong_prior * prior) / (tried + strong_prior)
            chance *= own + alike * (shared - own)
            survival[i, j] = chance


@compiled
def learn_requests(
    indices: Any,
    drafted: Any,
    accepted: Any,
    memory: float,
    idle_memory: float,
    class_of: Any,
    class_estimate: Any,
    alike_memory: float,
    max_alike: float,
    weak_prior: float,
    strong_prior: float,
    trials: Any,
    hits: Any,
    count: Any,
    class_trials: Any,
    class_hits: Any,
    class_alike: Any,
) -> int:
    """Add one step's observations to the requests, and sum them by class; returns how many requests drafted.

    ``class_alike`` gets the log odds, of the observations so far, that the strong prior predicts the requests of a
    class better than the weak one; older observations fade.
    """
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
        # The token after the accepted ones was tried and rejected; the tokens behind it were never compared.
        tried = min(drafted[i], kept + 1)
        count[row] += 1.0
        odds = alike_memory * class_alike[row]
        for j in range(positions):
            was_tried, was_hit = 1.0 if j < tried else 0.0, 1.0 if j < kept else 0.0
            if j < tried:
                hit, before, prior = hits[index, j], trials[index, j], class_estimate[row, j]
                own = (hit + weak_prior * prior) / (before + weak_prior)
                shared = (hit + strong_prior * prior) / (before + strong_prior)
                if j < kept:
                    odds += np.log(max(shared, 1e-3) / max(own, 1e-3))
                else:
                    odds += np.log(max(1.0 - shared, 1e-3) / max(1.0 - own, 1e-3))
            trials[index, j] = trials[index, j] * memory + was_tried
            hits[index, j] = hits[index, j] * memory + was_hit
            class_trials[row, j] += was_tried
            class_hits[row, j] += was_hit
        class_alike[row] = min(max(odds, -max_alike), max_alike)
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
    """Add a step's observations to the classes and their ancestors; ``count`` is then above 0 for all of these.

    Row 0 is all requests, rows up to ``kinds`` are kinds of sampling, later rows have a ``parent``. ``changed`` gets
    the rows whose short memory contradicts the long one by more than ``sigmas``; returns how many there are.
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
            # Many observations in one step count as at most 8 for the short memory, or it would not be short.
            left, weight = short_memory ** count[row], min(1.0, 8.0 / count[row])
            short_trials[row] = short_trials[row] * left + trials[row, 0] * weight
            short_hits[row] = short_hits[row] * left + hits[row, 0] * weight
            tried, long_tried = short_trials[row], class_trials[row, 0]
            long = min(max(class_hits[row, 0] / max(long_tried, 1e-9), 0.02), 0.98)
            # Under the long memory's rate p the short memory's hits have mean n p and variance n p (1 - p).
            surprising = abs(short_hits[row] - tried * long) > sigmas * np.sqrt(tried * long * (1 - long))
            if surprising and tried >= 2 and long_tried >= 2 * tried:
                changed[found] = row
                found += 1
    return found


@compiled
def estimate_class(
    row: int, trials: Any, hits: Any, parent: Any, prior_weight: float, optimism: float, estimate: Any
) -> None:
    """Estimates of a class from its observations and its parent's estimates, which must be up to date."""
    above = parent[row]
    for j in range(estimate.shape[1]):
        if j == 0:
            prior = optimism if row == 0 else estimate[above, 0]
        elif row == 0:
            prior = estimate[row, j - 1]
        else:
            # Unobserved positions continue with the parent's ratio of neighbouring positions.
            falls = estimate[above, j] / max(estimate[above, j - 1], 1e-3)
            prior = min(1.0, estimate[row, j - 1] * falls)
        estimate[row, j] = (hits[row, j] + prior_weight * prior) / (trials[row, j] + prior_weight)


@compiled
def refresh_classes(
    count: Any,
    kinds: int,
    max_refreshed: int,
    trials: Any,
    hits: Any,
    parent: Any,
    prior_weight: float,
    optimism: float,
    stale: Any,
    estimate: Any,
) -> None:
    """Refresh the estimates of classes: all up to row ``kinds``, and ``max_refreshed`` of the later ones.

    ``count`` is above 0 for classes with new observations, ``stale`` is the order in which others wait (0: up to date).
    """
    newest = stale.max()
    for row in range(len(count)):
        if count[row] > 0.0 and stale[row] == 0:
            newest += 1
            stale[row] = newest
    narrow = stale[kinds + 1 :]
    waiting = np.sort(narrow[narrow > 0])
    latest = waiting[min(max_refreshed, len(waiting)) - 1] if len(waiting) else 0
    for row in range(len(count)):
        # Parents have lower numbers than their children, so that they are refreshed first.
        if stale[row] > 0 and (row <= kinds or stale[row] <= latest):
            estimate_class(row, trials, hits, parent, prior_weight, optimism, estimate)
            stale[row] = 0
