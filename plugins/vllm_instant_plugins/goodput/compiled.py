"""The policy's inner loops, compiled: with hundreds of requests array operations would take several times as long.

Each function is the plain statement of what its caller documents; arrays that are written to come last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_instant_plugins.jit import compiled

LEVELS = 48
"""Thresholds of acceptance that plans are tried with, denser near zero (``choice.choose``)."""


@compiled
def level_of(value: float) -> int:
    """The highest threshold that a chance in 0..1 reaches."""
    return min(int(np.sqrt(value) * LEVELS), LEVELS - 1)


@compiled
def between(x: float, knots: Any, at_knots: Any) -> float:
    """Linear interpolation, constant beyond both ends."""
    right = np.searchsorted(knots, x)
    if right == 0:
        return float(at_knots[0])
    if right == len(knots):
        return float(at_knots[-1])
    share = (x - knots[right - 1]) / (knots[right] - knots[right - 1])
    return float(at_knots[right - 1] + share * (at_knots[right] - at_knots[right - 1]))


@compiled
def best_plan(
    reach: Any,
    weights: Any,
    yields: Any,
    knots: Any,
    at_knots: Any,
    off_at_knots: Any,
    context_seconds: float,
    verifying: float,
    drafting: Any,
    more_rows: float,
    most_rows: float,
    most_seconds: float,
    must_draft: bool,
    lengths: Any,
) -> tuple[int, int, float, float, float]:
    """Compare all plans (draft tokens at most, least level), as ``choice.choose`` says.

    ``at_knots`` and ``off_at_knots`` are believed seconds of steps with and without drafts at the knots of rows;
    ``drafting`` the drafter's seconds: at all, for each row, for each pass, for each pass and request. Returns the best
    plan's draft tokens at most, its least level, its expected accepted tokens, and seconds with and without drafts.
    """
    requests, positions = reach.shape
    rows, tokens = np.zeros((positions, LEVELS)), np.zeros((positions, LEVELS))
    base = 0.0
    for i in range(requests):
        base += weights[i]
        for j in range(positions):
            value = reach[i, j] * weights[i]
            level = level_of(value)
            rows[j, level] += yields[i]
            tokens[j, level] += value * yields[i]
    off_seconds = max(between(requests + more_rows, knots, off_at_knots) + context_seconds, 1e-6)
    allowed = max(most_seconds, off_seconds)
    best_rate = -1.0 if must_draft else base / off_seconds
    best_passes, best_level, best_tokens, best_seconds = 0, 0, 0.0, off_seconds
    above_rows, above_tokens = np.zeros(LEVELS), np.zeros(LEVELS)
    for j in range(positions):
        sum_rows = sum_tokens = 0.0
        for level in range(LEVELS - 1, -1, -1):
            sum_rows += rows[j, level]
            sum_tokens += tokens[j, level]
            above_rows[level] += sum_rows
            above_tokens[level] += sum_tokens
        passes = j + 1
        for level in range(LEVELS):
            extra = above_rows[level]
            if extra <= 0.0:
                break  # higher levels have no more
            all_rows = requests + more_rows + extra
            if all_rows > most_rows:
                continue
            seconds = max(between(all_rows, knots, at_knots) + context_seconds, 1e-6) + min(extra, 1.0) * verifying
            drafter = drafting[0] + drafting[1] * all_rows + passes * (drafting[2] + drafting[3] * requests)
            seconds += max(drafter, 0.0)
            rate = (base + above_tokens[level]) / seconds
            if seconds <= allowed and rate > best_rate:
                best_rate, best_passes, best_level = rate, passes, level
                best_tokens, best_seconds = above_tokens[level], seconds
    for i in range(requests):
        lengths[i] = 0
        for j in range(best_passes):
            lengths[i] += level_of(reach[i, j] * weights[i]) >= best_level
    return best_passes, best_level, best_tokens, best_seconds, off_seconds


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
    class_of: Any,
    trials: Any,
    hits: Any,
    count: Any,
    class_trials: Any,
    class_hits: Any,
) -> None:
    """Add one step's observations to the requests, and sum them up by class."""
    positions = trials.shape[1]
    for i in range(len(indices)):
        index = indices[i]
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


@compiled
def estimate_classes(
    rows: Any, trials: Any, hits: Any, parent: Any, prior_weight: float, optimism: float, estimate: Any
) -> None:
    """Estimates of classes from what they showed and their parents', which must come before them in ``rows``."""
    for row in rows:
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
def learn_classes(
    parent: Any,
    kinds: int,
    memory: float,
    short_memory: float,
    count: Any,
    trials: Any,
    hits: Any,
    class_trials: Any,
    class_hits: Any,
    short_trials: Any,
    short_hits: Any,
) -> None:
    """Add a step's observations by class to the classes and those above them; ``count`` then says which were touched.

    Row 0 is everything, rows up to ``kinds`` are kinds, those behind them belong to ``parent``.
    """
    positions = trials.shape[1]
    for row in range(len(count) - 1, 0, -1):
        if count[row] > 0.0:
            above = parent[row] if row > kinds else 0
            count[above] += count[row]
            for j in range(positions):
                trials[above, j] += trials[row, j]
                hits[above, j] += hits[row, j]
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


@compiled
def learn_costs(
    x: Any,
    seconds: float,
    noise: float,
    most_sigmas: float,
    common_drift: float,
    own_drift: float,
    weights: Any,
    covariance: Any,
) -> tuple[float, float]:
    """One step of the Kalman filter over the cost weights, with bounded surprise and drift.

    Returns how far off the estimate was, in standard deviations, and by what share it is still off.
    """
    size = len(x)
    expected = 0.0
    spread = np.zeros(size)
    for i in range(size):
        if x[i] != 0.0:
            expected += weights[i] * x[i]
            for j in range(size):
                spread[j] += covariance[i, j] * x[i]
    scale = max(expected, 1e-6)
    variance = noise * scale * scale
    for i in range(size):
        variance += x[i] * spread[i]
    deviation = np.sqrt(variance)
    surprise = (seconds - expected) / deviation
    bounded = min(max(surprise, -most_sigmas), most_sigmas) * deviation
    after = 0.0
    for i in range(size):
        weights[i] += spread[i] / variance * bounded
        after += weights[i] * x[i]
    for i in range(size):
        for j in range(size):
            # Drift: everything together, and each weight by itself.
            drift = weights[i] * weights[j] * common_drift * common_drift
            covariance[i, j] += drift - spread[i] * spread[j] / variance
        covariance[i, i] += (weights[i] * own_drift) ** 2
    return surprise, abs(seconds - after) / scale
