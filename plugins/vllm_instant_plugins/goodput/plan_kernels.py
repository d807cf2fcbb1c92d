"""The inner loops of choosing, compiled: all plans for a step are compared in microseconds.

Arrays that are written to come last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_instant_plugins.jit import compiled

LEVELS = 48
"""Thresholds of acceptance that plans are tried with, denser near zero (``choice.choose``)."""
UNAFFORDABLE = 1e6
"""Accepted tokens that nothing is expected to bring: the price of what shall not be done."""


@compiled
def level_of(value: float) -> int:
    """The highest threshold that a chance in 0..1 reaches."""
    return min(int(np.sqrt(value) * LEVELS), LEVELS - 1)


@compiled
def first_not_below(x: float, knots: Any, start: int) -> int:
    """``np.searchsorted(knots, x)``, walked to from a place nearby."""
    right = start
    while right > 0 and knots[right - 1] >= x:
        right -= 1
    while right < len(knots) and knots[right] < x:
        right += 1
    return right


@compiled
def between(x: float, right: int, knots: Any, at_knots: Any) -> float:
    """Linear interpolation, constant beyond both ends; ``right`` is the first knot that is not below ``x``."""
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
    max_rows: float,
    max_seconds: float,
    must_draft: bool,
    lengths: Any,
) -> tuple[int, int, float, float, float]:
    """Compare all plans (draft tokens at most, least level), as ``choice.choose`` says.

    ``at_knots`` and ``off_at_knots`` are believed seconds of steps with and without drafts at the knots of rows;
    ``drafting`` the drafter's seconds: at all, for each row, for each pass, for each pass and request. ``weights`` and
    ``yields`` may be empty, which is 1 for all. Returns the best plan's draft tokens at most, its least level, its
    expected accepted tokens, and seconds with and without drafts.
    """
    requests, positions = reach.shape
    weighted, partly = len(weights) > 0, len(yields) > 0
    levels = np.empty((requests, positions), np.int8)
    for i in range(requests):
        weight = weights[i] if weighted else 1.0
        for j in range(positions):
            levels[i, j] = level_of(reach[i, j] * weight)
    rows, tokens = np.zeros((positions, LEVELS)), np.zeros((positions, LEVELS))
    base = 0.0
    for i in range(requests):
        weight, delivered = weights[i] if weighted else 1.0, yields[i] if partly else 1.0
        base += weight
        for j in range(positions):
            level = levels[i, j]
            rows[j, level] += delivered
            tokens[j, level] += reach[i, j] * weight * delivered
    right = first_not_below(requests + more_rows, knots, 0)
    off_seconds = max(between(requests + more_rows, right, knots, off_at_knots) + context_seconds, 1e-6)
    allowed = max(max_seconds, off_seconds)
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
            if level and extra == above_rows[level - 1] and above_tokens[level] == above_tokens[level - 1]:
                continue  # nothing lies between the two: the same plan
            all_rows = requests + more_rows + extra
            if all_rows > max_rows:
                continue
            right = first_not_below(all_rows, knots, right)
            seconds = max(between(all_rows, right, knots, at_knots) + context_seconds, 1e-6)
            seconds += min(extra, 1.0) * verifying
            drafter = drafting[0] + drafting[1] * all_rows + passes * (drafting[2] + drafting[3] * requests)
            seconds += max(drafter, 0.0)
            rate = (base + above_tokens[level]) / seconds
            if seconds <= allowed and rate > best_rate:
                best_rate, best_passes, best_level = rate, passes, level
                best_tokens, best_seconds = above_tokens[level], seconds
    for i in range(requests):
        lengths[i] = 0
        for j in range(best_passes):
            lengths[i] += levels[i, j] >= best_level
    return best_passes, best_level, best_tokens, best_seconds, off_seconds


@compiled
def price_drafts(
    counts: Any,
    rows: float,
    max_rows: float,
    usual: float,
    rate: float,
    verifying: float,
    context_seconds: float,
    of_experts: Any,
    knots: Any,
    at_knots: Any,
    batch: Any,
) -> float:
    """Prices ``batch`` of verifying ``counts[1:]`` draft tokens beside ``rows``, in tokens at ``rate`` a second.

    ``of_experts`` are seconds of each of ``counts``, which begin with 0. Returns roughly the price of one draft token:
    the dearest of ``usual`` ones, half and twice as many.
    """
    nothing, affordable, right = 0.0, 1, 0
    extra = np.zeros(len(counts))
    for i in range(len(counts)):
        all_rows = rows + counts[i]
        right = first_not_below(all_rows, knots, right)
        seconds = max(between(all_rows, right, knots, at_knots) + of_experts[i] + context_seconds, 1e-6)
        if i == 0:
            nothing = seconds
        elif all_rows <= max_rows:
            extra[i] = rate * (seconds - nothing)
            affordable = i + 1
        else:
            extra[i] = UNAFFORDABLE
        if i > 0:
            batch[i - 1] = extra[i] + verifying
    if affordable == 1:
        return UNAFFORDABLE
    some, prices = counts[1:affordable], extra[1:affordable]
    rough = -np.inf
    for tokens in (0.5 * usual, usual, 2.0 * usual):
        rough = max(rough, between(tokens, first_not_below(tokens, some, 0), some, prices) / tokens)
    return rough
