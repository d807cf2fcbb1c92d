"""Which draft lengths give the most expected tokens per second.

A step with ``n`` requests yields ``n`` tokens plus, for each draft token, the probability that it survives
verification; it takes the time that ``StepCosts`` estimates. The best draft tokens are always the most probable ones,
so that a plan is two numbers: how many tokens the drafter makes one after the other (``draft_steps``), and the survival
probability from which a token is worth its row (``threshold``). All pairs of these are compared, with the survival
probabilities sorted into a histogram, because the cost curve has steps and a hill climb would stop at the first one.

On devices with CUDA graphs a step in which all requests verify the same number of drafts runs as one graph, and other
steps take longer. Plans of one number for all requests are compared with the best uneven plan, each at its own price.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_instant import FullGraphs
from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.jit import compiled

Array = npt.NDArray[np.float64]

LEVELS = 48
"""Thresholds of survival that plans are tried with: level ``k`` is ``(k / LEVELS) ** 2``, denser near zero."""
MIN_DRAFT_COST = 0.03
"""Share of a step without drafts that any draft token is assumed to cost at least."""
_EVEN: Array = np.ones(0)
"""Weights or delivery rates that are 1 for all."""
_FREE_DRAFTER: Array = np.zeros(4)


@dataclass(slots=True)  # not frozen: frozen dataclasses take longer to construct
class StepPlan:
    """A plan for one step and what is expected of it; tokens and seconds are per step."""

    num_draft_tokens: npt.NDArray[np.intp]
    """Draft tokens of each request."""
    draft_steps: int
    """Draft tokens that the drafter makes one after the other."""
    tokens: float
    seconds: float
    baseline_seconds: float
    """Seconds of the step without drafts."""
    num_requests: int
    threshold: float
    """Survival probability from which a draft token is worth its row."""

    @property
    def gain(self) -> float:
        """Expected tokens per second relative to no drafting."""
        return self.tokens / self.seconds * self.baseline_seconds / self.num_requests

    def return_on_drafts(self, delivered: float) -> float:
        """Expected accepted tokens relative to what the time of the drafts would yield without drafts.

        ``delivered``: draft tokens that the drafter is expected to deliver. A step with one takes at least
        ``MIN_DRAFT_COST`` longer: the return comes from accepted tokens, not from an estimate that drafts cost nothing.
        """
        floor = MIN_DRAFT_COST * self.baseline_seconds * min(1.0, delivered)
        extra = max(self.seconds - self.baseline_seconds, floor)
        accepted = self.tokens - self.num_requests
        return accepted * self.baseline_seconds / (extra * self.num_requests) if extra > 0 else 0.0

    @property
    def total_draft_tokens(self) -> int:
        """Draft tokens granted in total."""
        return int(self.num_draft_tokens.sum())


def no_drafts(num_requests: int, num_draft_tokens: npt.NDArray[np.intp] | None = None) -> StepPlan:
    """A plan about which nothing is estimated: no drafts, or the lengths that clients fixed."""
    if num_draft_tokens is None:
        num_draft_tokens = np.zeros(num_requests, np.intp)
    return StepPlan(num_draft_tokens, int(num_draft_tokens.max()), num_requests, 1.0, 1.0, num_requests, 1.0)


def max_step_seconds(
    plan: StepPlan, survival: Array, delivery_rate: Array | None, min_speed: float, saved: Array
) -> float:
    """Seconds of a step beyond which its drafts slow some request down to less than ``min_speed`` of its baseline.

    A request's speed relative to no drafts is ``(1 + accepted) / seconds * baseline_seconds``. A request whose accepted
    drafts have saved it time may be slowed down further by as much: the drafts that save it time come in some steps,
    those of the others in other ones.

    Args:
        plan: the plan.
        survival: as for ``plan_step``.
        delivery_rate: as for ``plan_step``.
        min_speed: in 0..1, above 0.
        saved: seconds that each request has saved, ``[requests]``.

    """
    drafted = np.arange(survival.shape[1]) < plan.num_draft_tokens[:, None]
    accepted = np.where(drafted, survival, 0.0).sum(1)
    if delivery_rate is not None:
        accepted *= delivery_rate
    return float(((1.0 + accepted) * plan.baseline_seconds / min_speed + saved).min())


def plan_step(
    survival: Array,
    costs: StepCosts,
    context: float,
    *,
    max_rows: float,
    max_seconds: float = np.inf,
    weights: Array | None = None,
    delivery_rate: Array | None = None,
    must_draft: bool = False,
    more_rows: float = 0.0,
    sigmas: float = 0.0,
    drafting_counts: bool = True,
    graphs: FullGraphs | None = None,
) -> StepPlan:
    """The plan with the most expected tokens per second, which may be to draft nothing.

    Args:
        survival: probability that draft token j of request i and all before it are accepted,
            ``[requests, positions]``, falling in j.
        costs: seconds of steps.
        context: tokens of context over all requests.
        max_rows: plans with more rows than this are not considered.
        max_seconds: longer plans are not considered, unless drafting nothing takes longer, too.
        weights: value of a token of each request, ``[requests]``; 1 by default.
        delivery_rate: share of the granted draft tokens that the drafter delivers, ``[requests]``; 1 by default.
        must_draft: the best plan that drafts anything, if the limits allow one.
        more_rows: rows that the step has in any case, beside one per request.
        sigmas: standard deviations that steps with drafts are assumed to cost less than estimated.
        drafting_counts: False where the drafter itself weighs its own cost.
        graphs: steps that run as one CUDA graph; all others take longer. None: there is no such difference.

    """
    num_requests = len(survival)
    if more_rows:
        graphs = None  # requests with numbers of their own: no plan for the others makes the step a graph
    piecewise = 0.0 if graphs is None else costs.piecewise_seconds()
    baseline_at_knots = costs.at_knots()
    at_knots = costs.at_knots(sigmas, num_requests + more_rows) if sigmas else baseline_at_knots
    if costs.experts.counted:
        # Draft tokens share experts with the token before them, other requests do not: rows alone do not determine it.
        of_experts = costs.expert_seconds(costs.knots, num_requests)
        baseline_at_knots, at_knots = baseline_at_knots + of_experts, at_knots + of_experts
    curve = StepCurve(
        costs.knots,
        at_knots,
        baseline_at_knots,
        costs.context_seconds(context),
        costs.verify_seconds(),
        costs.draft_weights() if drafting_counts else _FREE_DRAFTER,
        piecewise,
        0.0 if graphs is None or covers(graphs, num_requests, 0) else piecewise,
    )
    num_draft_tokens = np.empty(num_requests, np.intp)
    draft_steps, lowest, tokens, seconds, baseline_seconds = search_plans(
        survival,
        _EVEN if weights is None else weights,
        _EVEN if delivery_rate is None else delivery_rate,
        curve,
        float(more_rows),
        float(max_rows),
        float(max_seconds),
        must_draft,
        num_draft_tokens,
    )
    threshold = (lowest / LEVELS) ** 2 if draft_steps else 1.0
    lengths = [] if graphs is None else [n for n in graphs.lengths if n and covers(graphs, num_requests, n)]
    if lengths:
        base = num_requests if weights is None else float(weights.sum())
        length, even_tokens, even_seconds = search_even_plans(
            survival,
            _EVEN if weights is None else weights,
            _EVEN if delivery_rate is None else delivery_rate,
            curve,
            np.array(lengths),
            float(max_rows),
            max(max_seconds, baseline_seconds),
            baseline_seconds,
            -1.0 if must_draft and not draft_steps else (base + tokens) / seconds,
        )
        if length:
            draft_steps, tokens, seconds = length, even_tokens, even_seconds
            num_draft_tokens[:] = length
            threshold = float(survival[:, min(length, survival.shape[1]) - 1].min())
    if weights is not None:
        tokens = float(survival[np.arange(survival.shape[1]) < num_draft_tokens[:, None]].sum())
    return StepPlan(
        num_draft_tokens, draft_steps, num_requests + tokens, seconds, baseline_seconds, num_requests, threshold
    )


# ---------------------------------------------------------------------------------------------------- compiled loops


class StepCurve(NamedTuple):
    """Seconds of a step, as the compiled loops read it."""

    knots: Any
    """Rows at which the curve is known, rising."""
    at_knots: Any
    """Seconds of the target model with drafts at each knot; linear in between, constant beyond both ends."""
    baseline_at_knots: Any
    """The same without drafts."""
    context_seconds: float
    verify_seconds: float
    """Verification of any drafts at all."""
    drafter: Any
    """Seconds of the drafter: fixed, per row of the target, per draft step, per draft step and request."""
    piecewise_seconds: float = 0.0
    """Seconds more of a step with drafts outside of FULL CUDA graphs,"""
    baseline_piecewise_seconds: float = 0.0
    """and of a step without drafts, if it is outside of them, too."""


def covers(graphs: FullGraphs, num_requests: int, length: int) -> bool:
    """Whether a step of ``num_requests`` with ``length`` draft tokens each runs as one CUDA graph."""
    return length in graphs.lengths and num_requests * (1 + length) <= graphs.max_rows


@compiled
def level_of(value: float) -> int:
    """The highest threshold that a probability reaches."""
    return min(int(np.sqrt(value) * LEVELS), LEVELS - 1)


@compiled
def first_not_below(x: float, knots: Any, start: int) -> int:
    """``np.searchsorted(knots, x)``, found by a walk from ``start``, which is nearby in a loop over rising ``x``."""
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
def search_plans(
    survival: Any,
    weights: Any,
    delivery_rate: Any,
    curve: Any,
    more_rows: float,
    max_rows: float,
    max_seconds: float,
    must_draft: bool,
    num_draft_tokens: Any,
) -> tuple[int, int, float, float, float]:
    """Compare all plans (draft steps, lowest level) by weighted tokens per second; see ``plan_step``.

    ``weights`` and ``delivery_rate`` may be empty, which is 1 for all; ``num_draft_tokens`` is written. Returns the
    best plan's draft steps, its lowest level, its expected accepted tokens, and seconds with and without drafts.
    """
    num_requests, positions = survival.shape
    has_weights, has_rates = len(weights) > 0, len(delivery_rate) > 0
    # Histogram over levels, by position: how many rows, and how many expected tokens, a threshold would let through.
    # A plan is then a partial sum of it, so that the search takes positions * LEVELS steps for any number of requests.
    levels = np.empty((num_requests, positions), np.int8)
    rows, tokens = np.zeros((positions, LEVELS)), np.zeros((positions, LEVELS))
    base = 0.0
    for i in range(num_requests):
        weight, delivered = weights[i] if has_weights else 1.0, delivery_rate[i] if has_rates else 1.0
        base += weight
        for j in range(positions):
            value = survival[i, j] * weight
            level = level_of(value)
            levels[i, j] = level
            rows[j, level] += delivered
            tokens[j, level] += value * delivered
    # Without drafts each request brings one token: rate = sum(weights) / baseline_seconds.
    right = first_not_below(num_requests + more_rows, curve.knots, 0)
    baseline = between(num_requests + more_rows, right, curve.knots, curve.baseline_at_knots)
    baseline_seconds = max(baseline + curve.context_seconds, 1e-6) + curve.baseline_piecewise_seconds
    allowed = max(max_seconds, baseline_seconds)
    best_rate = -1.0 if must_draft else base / baseline_seconds
    best_steps, best_level, best_tokens, best_seconds = 0, 0, 0.0, baseline_seconds
    above_rows, above_tokens = np.zeros(LEVELS), np.zeros(LEVELS)
    drafter = curve.drafter
    for j in range(positions):
        # above[level] sums positions 0..j and all levels from ``level`` up: one more position is one more suffix sum.
        sum_rows = sum_tokens = 0.0
        for level in range(LEVELS - 1, -1, -1):
            sum_rows += rows[j, level]
            sum_tokens += tokens[j, level]
            above_rows[level] += sum_rows
            above_tokens[level] += sum_tokens
        draft_steps = j + 1
        for level in range(LEVELS):
            extra = above_rows[level]
            if extra <= 0.0:
                break  # higher levels let nothing through either
            if level and extra == above_rows[level - 1] and above_tokens[level] == above_tokens[level - 1]:
                continue  # no token lies between the two thresholds: the same plan
            all_rows = num_requests + more_rows + extra
            if all_rows > max_rows:
                continue
            # seconds = target(rows) + context + verify + drafter. Expected rows below one mean that a draft is only
            # sometimes delivered, so that verification is only sometimes paid for: min(extra, 1).
            right = first_not_below(all_rows, curve.knots, right)
            seconds = max(between(all_rows, right, curve.knots, curve.at_knots) + curve.context_seconds, 1e-6)
            seconds += min(extra, 1.0) * (curve.verify_seconds + curve.piecewise_seconds)
            drafting = drafter[0] + drafter[1] * all_rows + draft_steps * (drafter[2] + drafter[3] * num_requests)
            # Where the curve falls with the rows, a plan would gain although no draft is accepted, and a wrong time of
            # a step without drafts would not be measured again: the gain must come from tokens.
            seconds = max(seconds + max(drafting, 0.0), baseline_seconds)
            rate = (base + above_tokens[level]) / seconds
            if seconds <= allowed and rate > best_rate:
                best_rate, best_steps, best_level = rate, draft_steps, level
                best_tokens, best_seconds = above_tokens[level], seconds
    # Survival falls with the position, so that the tokens above the threshold are the first ones of each request.
    for i in range(num_requests):
        num_draft_tokens[i] = 0
        for j in range(best_steps):
            num_draft_tokens[i] += levels[i, j] >= best_level
    return best_steps, best_level, best_tokens, best_seconds, baseline_seconds


@compiled
def search_even_plans(
    survival: Any,
    weights: Any,
    delivery_rate: Any,
    curve: Any,
    lengths: Any,
    max_rows: float,
    max_seconds: float,
    baseline_seconds: float,
    min_rate: float,
) -> tuple[int, float, float]:
    """The best of ``lengths``, draft tokens of every request, if it yields more tokens per second than ``min_rate``.

    Arguments as for ``search_plans``, which says why no plan is shorter than ``baseline_seconds``. Returns the length
    (0: none), its expected accepted tokens, and its seconds.
    """
    num_requests, positions = survival.shape
    has_weights, has_rates = len(weights) > 0, len(delivery_rate) > 0
    at_position = np.zeros(positions)
    base, delivering = 0.0, 0.0
    for i in range(num_requests):
        weight, delivered = weights[i] if has_weights else 1.0, delivery_rate[i] if has_rates else 1.0
        base += weight
        delivering += delivered
        for j in range(positions):
            at_position[j] += survival[i, j] * weight * delivered
    best, best_tokens, best_seconds, best_rate, right = 0, 0.0, 0.0, min_rate, 0
    drafter = curve.drafter
    for length in lengths:
        rows = num_requests + length * delivering
        if length > positions or rows > max_rows:
            continue
        right = first_not_below(rows, curve.knots, right)
        seconds = max(between(rows, right, curve.knots, curve.at_knots) + curve.context_seconds, 1e-6)
        seconds += min(length * delivering, 1.0) * curve.verify_seconds
        drafting = drafter[0] + drafter[1] * rows + length * (drafter[2] + drafter[3] * num_requests)
        seconds = max(seconds + max(drafting, 0.0), baseline_seconds)
        tokens = at_position[:length].sum()
        rate = (base + tokens) / seconds
        if seconds <= max_seconds and rate > best_rate:
            best, best_tokens, best_seconds, best_rate = length, tokens, seconds, rate
    return best, best_tokens, best_seconds
