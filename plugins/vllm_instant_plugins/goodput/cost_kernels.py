"""The compiled inner loops of the cost model. Arrays that are written come last."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_instant_plugins.jit import compiled


@compiled
def describe_step(
    knots: Any,
    rows: float,
    context: float,
    drafts: float,
    draft_steps: float,
    requests: float,
    uncached_tokens: float,
    piecewise: float,
    experts: float,
    x: Any,
) -> None:
    """Write the feature vector ``x`` of a step, which holds zeros before; see ``StepCosts.features``."""
    count = len(knots)
    right = min(max(int(np.searchsorted(knots, rows)), 1), count - 1)
    left = right - 1
    # Piecewise-linear in rows: the two neighbouring knots share the weight 1 (a linear B-spline basis).
    share = (min(rows, knots[-1]) - knots[left]) / (knots[right] - knots[left])
    x[left], x[right] = 1.0 - share, share
    x[count] = context
    x[count + 1] = 1.0 if drafts > 0.0 else 0.0
    if draft_steps > 0.0:
        x[count + 2], x[count + 3] = 1.0, rows
    x[count + 4], x[count + 5] = draft_steps, draft_steps * requests
    x[count + 6] = 1.0 if uncached_tokens > 0.0 else 0.0
    x[count + 7] = uncached_tokens
    x[count + 8] = piecewise
    x[count + 9] = experts


@compiled
def estimate_step(x: Any, weights: Any, covariance: Any) -> tuple[float, float]:
    """Expected seconds of a step, ``x · w``, and their variance, ``x · P x``."""
    seconds = variance = 0.0
    for i in range(len(x)):
        if x[i] != 0.0:
            seconds += weights[i] * x[i]
            for j in range(len(x)):
                variance += x[i] * covariance[i, j] * x[j]
    return seconds, variance


@compiled
def learn_costs(
    x: Any,
    seconds: float,
    noise: float,
    max_sigmas: float,
    common_drift: float,
    own_drift: float,
    knots: Any,
    weights: Any,
    covariance: Any,
) -> tuple[float, float, float]:
    """One step of a Kalman filter over the cost weights, with bounded innovation and drift.

    Weights ``w`` with covariance ``P``; the measurement is ``seconds = x · w + noise``.

    Returns the innovation in standard deviations, the remaining error after the update as a share of the estimate, and
    the step's rows.
    """
    size = len(x)
    expected = 0.0
    spread = np.zeros(size)
    for i in range(size):
        if x[i] != 0.0:
            expected += weights[i] * x[i]
            for j in range(size):
                spread[j] += covariance[i, j] * x[i]
    # Innovation variance S = x P x + R, where the noise R is relative to the expected time.
    scale = max(expected, 1e-6)
    variance = noise * scale * scale
    for i in range(size):
        variance += x[i] * spread[i]
    deviation = np.sqrt(variance)
    surprise = (seconds - expected) / deviation
    bounded = min(max(surprise, -max_sigmas), max_sigmas) * deviation
    # What was clipped was not learned either: certainty grows only by the share that was used.
    learned = min(1.0, max_sigmas / max(abs(surprise), 1e-9))
    # Gain K = P x / S. The innovation is clipped (Huber), so that one outlier moves the weights a bounded distance.
    for i in range(size):
        weights[i] += spread[i] / variance * bounded
    for i in range(len(knots) + 1, size):
        if weights[i] < 0.0 and covariance[i, i] > 0.0:
            # Verification and drafting take time, so that their weights are not negative. The most probable weights
            # under that condition are the projection along the covariance: w += P e_i * (-w_i / P_ii).
            step = -weights[i] / covariance[i, i]
            for j in range(size):
                weights[j] += covariance[j, i] * step
            weights[i] = 0.0
    after = 0.0
    for i in range(size):
        after += weights[i] * x[i]
    for i in range(size):
        for j in range(size):
            # P += drift - (P x)(P x)^T / S. Drift is common to all weights (in proportion to them) and of each alone.
            drift = weights[i] * weights[j] * common_drift * common_drift
            covariance[i, j] += drift - learned * spread[i] * spread[j] / variance
        covariance[i, i] += (weights[i] * own_drift) ** 2
    rows = 0.0
    for i in range(len(knots)):
        rows += x[i] * knots[i]
    return surprise, (seconds - after) / scale, rows


@compiled
def monotone_curve(weights: Any, covariance: Any, recent: Any, min_recent: float, min_fall: float, curve: Any) -> None:
    """The curve over the knots, as ``weights`` have it but rising: more rows do not take less time.

    Isotonic regression by pooling of adjacent violators, each knot weighted by its precision ``1 / P_ii``. Where both
    neighbours were measured at least ``min_recent`` times recently, the curve may fall by ``min_fall`` of it or more.
    """
    count = len(curve)
    values, precisions, sizes = np.empty(count), np.empty(count), np.empty(count, np.int64)
    blocks = 0
    for i in range(count):
        values[blocks] = weights[i]
        precisions[blocks] = 1.0 / max(covariance[i, i], 1e-18)
        sizes[blocks] = 1
        blocks += 1
        last = i
        while blocks > 1 and values[blocks - 2] > values[blocks - 1]:
            before = last - sizes[blocks - 1]
            clear = values[blocks - 1] < (1.0 - min_fall) * values[blocks - 2]
            if clear and min(recent[before], recent[before + 1]) >= min_recent:
                break
            total = precisions[blocks - 2] + precisions[blocks - 1]
            values[blocks - 2] = (
                values[blocks - 2] * precisions[blocks - 2] + values[blocks - 1] * precisions[blocks - 1]
            ) / total
            precisions[blocks - 2] = total
            sizes[blocks - 2] += sizes[blocks - 1]
            blocks -= 1
    i = 0
    for block in range(blocks):
        for _ in range(sizes[block]):
            curve[i] = values[block]
            i += 1


@compiled
def reference_deviation(
    knots: Any,
    rows: float,
    context: float,
    drafts: float,
    draft_steps: float,
    requests: float,
    piecewise: float,
    baseline_piecewise: float,
    experts: float,
    baseline_experts: float,
    weights: Any,
    covariance: Any,
    noise: float,
) -> float:
    """Expected relative change of the ratio of a step with drafts to one without by a measured time of the latter.

    The preposterior standard deviation ``|cov(c, b)| / sqrt(var(b) + R)`` of the contrast ``c`` of both relative
    times, with the noise ``R`` of one measurement. What all steps share is not part of the contrast.
    """
    plan, baseline = np.zeros(len(weights)), np.zeros(len(weights))
    describe_step(knots, rows + drafts, context, drafts, draft_steps, requests, 0.0, piecewise, experts, plan)
    describe_step(knots, rows, context, 0.0, 0.0, requests, 0.0, baseline_piecewise, baseline_experts, baseline)
    seconds = baseline_seconds = 0.0
    for i in range(len(weights)):
        seconds += weights[i] * plan[i]
        baseline_seconds += weights[i] * baseline[i]
    seconds, baseline_seconds = max(seconds, 1e-6), max(baseline_seconds, 1e-6)
    with_plan = with_baseline = 0.0
    for i in range(len(weights)):
        if baseline[i] != 0.0:
            for j in range(len(weights)):
                spread = baseline[i] / baseline_seconds * covariance[i, j]
                with_plan += spread * plan[j] / seconds
                with_baseline += spread * baseline[j] / baseline_seconds
    return float(abs(with_plan - with_baseline) / np.sqrt(with_baseline + noise))
