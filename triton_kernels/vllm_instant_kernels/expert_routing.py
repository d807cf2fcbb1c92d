"""Batch-aware expert routing of one MoE layer in four launches: score, select, repick, count.

In tensor operations this is about 70 launches per layer and step. Here, without synchronisation with the host:

* ``_score_rows``, one program per row: the scores of the row's native picks, the picks ordered best first.
* ``_select``, one program: the demand for each expert is the sum of the scores of the decoding rows that pick it, times
  its prior and ``1 + cohesion * f`` with the fraction ``f`` of all demand that goes to its group; experts that some
  token must keep are protected. Allowed are the protected experts and then those with the largest demand, up to
  ``max(budget, number protected, top_k)``.
* ``_repick``, one program per row: a decoding row with a refused pick picks its top k among the allowed experts.
* ``_count``, one program: distinct experts and router weights, natively and as routed. It returns at once unless
  ``counting`` is set, so that a CUDA graph counts only in the steps that ask for it.

Sums over rows have a fixed order: tensor-parallel workers compute the same bits from the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
DECODE, PREFILL = tl.constexpr(2), tl.constexpr(1)
"""Values of ``vllm_instant.interfaces.experts.RowKind``."""
CELLS = 8192
"""Approximate size of the table of picks times experts that a reduction holds at once."""


@triton.jit
def _scores(logits, is_expert, FUNCTION: tl.constexpr):
    """The weight of each expert before normalisation over the picks, float32, 0 for padding."""
    if FUNCTION == 0:
        shifted = tl.where(is_expert, logits - tl.max(tl.where(is_expert, logits, -float("inf")), axis=0), -1.0e30)
        exponentials = tl.exp(shifted)
        scores = exponentials / tl.sum(exponentials, axis=0)
    elif FUNCTION == 1:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        # softplus(x) = max(x, 0) + log(1 + t) with t = e^-|x|; near t = 0 the logarithm is its Taylor series.
        t = tl.exp(-tl.abs(logits))
        log1p = tl.where(t < 0.01, t * (1.0 + t * (-0.5 + t * (1.0 / 3.0 - t * 0.25))), tl.log(1.0 + t))
        scores = tl.sqrt(tl.maximum(logits, 0.0) + log1p)
    return tl.where(is_expert, scores, 0.0)


@triton.jit
def _score_rows(
    logits_ptr,
    bias_ptr,
    picks_ptr,
    own_ptr,
    own_scores_ptr,
    logits_stride,
    FUNCTION: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    PICKS: tl.constexpr,
):
    """Grid ``[rows]``. Writes the native picks, best first, and their scores."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS_PADDED)
    is_expert = expert < EXPERTS
    logits = tl.load(logits_ptr + row * logits_stride + expert, mask=is_expert, other=0.0).to(tl.float32)
    scores = _scores(logits, is_expert, FUNCTION)
    lane = tl.arange(0, PICKS)
    is_pick = lane < TOP_K
    picks = tl.load(picks_ptr + row * TOP_K + lane, mask=is_pick, other=-1)
    hit = picks[:, None] == expert[None, :]
    own = tl.sum(tl.where(hit, scores[None, :], 0.0), axis=1)
    rank_by = own
    if bias_ptr is not None:
        rank_by += tl.load(bias_ptr + picks, mask=is_pick, other=0.0)
    rank_by = tl.where(is_pick, rank_by, -float("inf"))
    # The rank of a pick: how many precede it; ties keep their order.
    precedes = (rank_by[None, :] > rank_by[:, None]) | (
        (rank_by[None, :] == rank_by[:, None]) & (lane[None, :] < lane[:, None])
    )
    place = tl.sum(precedes.to(tl.int32), axis=1)
    tl.store(own_ptr + row * TOP_K + place, picks, mask=is_pick)
    tl.store(own_scores_ptr + row * TOP_K + place, own, mask=is_pick)


@triton.jit
def _select(
    own_ptr,
    own_scores_ptr,
    kinds_ptr,
    budget_ptr,
    prior_ptr,
    cluster_ptr,
    allowed_ptr,
    rows,
    clusters,
    cohesion,
    keep,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Grid ``[1]``. Writes which experts rows may use, as int8."""
    expert = tl.arange(0, EXPERTS_PADDED)
    demand = tl.zeros([EXPERTS_PADDED], tl.float32)
    protected = tl.zeros([EXPERTS_PADDED], tl.int32)
    for first in range(0, rows * TOP_K, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < rows * TOP_K
        kind = tl.load(kinds_ptr + entry // TOP_K, mask=inside, other=0)
        pick = tl.load(own_ptr + entry, mask=inside, other=-1)
        score = tl.load(own_scores_ptr + entry, mask=inside, other=0.0)
        hit = pick[:, None] == expert[None, :]
        demand += tl.sum(tl.where(hit & (kind == DECODE)[:, None], score[:, None], 0.0), axis=0)
        protects = (kind == PREFILL) | ((kind == DECODE) & (entry % TOP_K < keep))
        protected = tl.maximum(protected, tl.max((hit & protects[:, None]).to(tl.int32), axis=0))
    if prior_ptr is not None:
        demand *= tl.load(prior_ptr + expert, mask=expert < EXPERTS, other=0.0)
    if cluster_ptr is not None:
        cluster = tl.load(cluster_ptr + expert, mask=expert < EXPERTS, other=-1)
        total = tl.maximum(tl.sum(demand, axis=0), 1e-30)
        fraction = tl.zeros([EXPERTS_PADDED], tl.float32)
        for number in range(0, clusters):
            member = cluster == number
            fraction = tl.where(member, tl.sum(tl.where(member, demand, 0.0), axis=0) / total, fraction)
        demand *= 1.0 + cohesion * fraction
    # Sort by demand, ties by index: the bits of non-negative floats are ordered like the floats.
    demand = tl.where(protected > 0, float("inf"), demand)
    bits = demand.to(tl.int32, bitcast=True).to(tl.int64)
    key = tl.where(expert < EXPERTS, (bits << 32) | (EXPERTS_PADDED - expert).to(tl.int64), -1)
    limit = tl.maximum(tl.load(budget_ptr).to(tl.int32), tl.maximum(tl.sum(protected, axis=0), TOP_K))
    limit = tl.minimum(limit, EXPERTS)
    ordered = tl.sort(key, descending=True)
    threshold = tl.sum(tl.where(expert == limit - 1, ordered, 0), axis=0)
    tl.store(allowed_ptr + expert, (key >= threshold).to(tl.int8), mask=expert < EXPERTS)


@triton.jit
def _repick(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    picks_ptr,
    kinds_ptr,
    allowed_ptr,
    new_weights_ptr,
    new_picks_ptr,
    routed_mass_ptr,
    logits_stride,
    scale,
    FUNCTION: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    PICKS: tl.constexpr,
):
    """Grid ``[rows]``. Writes the final picks and weights, and the sum of the scores of the picks."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS_PADDED)
    is_expert = expert < EXPERTS
    lane = tl.arange(0, PICKS)
    is_pick = lane < TOP_K
    logits = tl.load(logits_ptr + row * logits_stride + expert, mask=is_expert, other=0.0).to(tl.float32)
    scores = _scores(logits, is_expert, FUNCTION)
    picks = tl.load(picks_ptr + row * TOP_K + lane, mask=is_pick, other=-1)
    weights = tl.load(weights_ptr + row * TOP_K + lane, mask=is_pick, other=0.0)
    is_allowed = tl.load(allowed_ptr + expert, mask=is_expert, other=0) > 0
    refused = tl.sum(tl.where(is_pick & (tl.load(allowed_ptr + picks, mask=is_pick, other=1) == 0), 1, 0), axis=0)
    if (tl.load(kinds_ptr + row) == DECODE) & (refused > 0):
        choice = scores
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + expert, mask=is_expert, other=0.0)
        choice = tl.where(is_allowed, choice, -float("inf"))
        for place in range(0, TOP_K):
            best = tl.argmax(choice, axis=0)
            picks = tl.where(lane == place, best, picks)
            choice = tl.where(expert == best, -float("inf"), choice)
        hit = picks[:, None] == expert[None, :]
        weights = tl.sum(tl.where(hit, scores[None, :], 0.0), axis=1)
        if RENORMALIZE:
            weights = weights / tl.maximum(tl.sum(weights, axis=0), 1e-20)
        weights = weights * scale
    tl.store(new_picks_ptr + row * TOP_K + lane, picks, mask=is_pick)
    tl.store(new_weights_ptr + row * TOP_K + lane, weights, mask=is_pick)
    routed = tl.sum((picks[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(routed_mass_ptr + row, tl.sum(tl.where(routed > 0, scores, 0.0), axis=0))


@triton.jit
def _count(
    own_ptr,
    own_scores_ptr,
    new_picks_ptr,
    routed_mass_ptr,
    kinds_ptr,
    counting_ptr,
    counted_ptr,
    rows,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Grid ``[1]``. Adds distinct native and routed experts, native and routed mass of decoding rows to ``counted``."""
    if tl.load(counting_ptr) > 0.0:
        expert = tl.arange(0, EXPERTS_PADDED)
        native = tl.zeros([EXPERTS_PADDED], tl.int32)
        routed = tl.zeros([EXPERTS_PADDED], tl.int32)
        native_mass = 0.0
        routed_mass = 0.0
        for first in range(0, rows * TOP_K, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            inside = entry < rows * TOP_K
            counts = inside & (tl.load(kinds_ptr + entry // TOP_K, mask=inside, other=0) == DECODE)
            own = tl.load(own_ptr + entry, mask=counts, other=-1)
            new = tl.load(new_picks_ptr + entry, mask=counts, other=-1)
            native = tl.maximum(native, tl.max((own[:, None] == expert[None, :]).to(tl.int32), axis=0))
            routed = tl.maximum(routed, tl.max((new[:, None] == expert[None, :]).to(tl.int32), axis=0))
            native_mass += tl.sum(tl.load(own_scores_ptr + entry, mask=counts, other=0.0), axis=0)
            is_first = counts & (entry % TOP_K == 0)
            routed_mass += tl.sum(tl.load(routed_mass_ptr + entry // TOP_K, mask=is_first, other=0.0), axis=0)
        tl.store(counted_ptr, tl.load(counted_ptr) + tl.sum(native, axis=0))
        tl.store(counted_ptr + 1, tl.load(counted_ptr + 1) + tl.sum(routed, axis=0))
        tl.store(counted_ptr + 2, tl.load(counted_ptr + 2) + native_mass)
        tl.store(counted_ptr + 3, tl.load(counted_ptr + 3) + routed_mass)


@dataclass(frozen=True)
class RoutingRule:
    """The rule of one layer: the model's scoring and the selection of experts."""

    function: str
    """One of ``FUNCTIONS``."""
    bias: torch.Tensor | None
    """float32 ``[experts]``, added to scores for ranking only."""
    renormalize: bool
    scale: float
    keep: int
    """Top-ranked experts per token that are protected."""
    budget: torch.Tensor
    """int64 scalar on the device: number of experts that a step may use."""
    prior: torch.Tensor | None = None
    """float32 ``[experts]``: positive factors on the demand."""
    cluster: torch.Tensor | None = None
    """int32 ``[experts]``: the group of each expert."""
    num_clusters: int = 0
    cohesion: float = 0.0


def route_within_budget(
    rule: RoutingRule,
    logits: torch.Tensor,
    weights: torch.Tensor,
    picks: torch.Tensor,
    kinds: torch.Tensor,
    counting: torch.Tensor,
    counted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route the decoding rows of a step within the budget of experts.

    Four launches on the current stream; grids depend on shapes only.

    Args:
        rule: the layer's rule; the model's routing must be without groups.
        logits: floats ``[rows, experts]`` with contiguous rows.
        weights: float32 ``[rows, top_k]``, contiguous: the native weights.
        picks: int32 ``[rows, top_k]``, contiguous: the native picks in any order.
        kinds: int8 ``[rows]``: ``RowKind`` of each row.
        counting: float32 scalar; nothing is counted unless it is positive.
        counted: float64 ``[4]``: distinct native and routed experts, native and routed mass are added to it.

    Returns:
        Final weights and picks, as ``weights`` and ``picks``.

    """
    (rows, experts), top_k = logits.shape, picks.shape[1]
    new_weights, new_picks = torch.empty_like(weights), torch.empty_like(picks)
    if not rows:
        return new_weights, new_picks
    own, own_scores = torch.empty_like(picks), torch.empty_like(weights)
    allowed = torch.empty(experts, dtype=torch.int8, device=logits.device)
    routed_mass = torch.empty(rows, dtype=torch.float32, device=logits.device)
    padded, lanes = triton.next_power_of_2(experts), triton.next_power_of_2(top_k)
    entries = max(CELLS // padded, 16)
    sizes = {"EXPERTS": experts, "EXPERTS_PADDED": padded, "TOP_K": top_k}
    scoring = {"FUNCTION": FUNCTIONS.index(rule.function), "PICKS": lanes, **sizes}
    _score_rows[(rows,)](logits, rule.bias, picks, own, own_scores, logits.stride(0), **scoring, num_warps=1)
    _select[(1,)](
        own,
        own_scores,
        kinds,
        rule.budget,
        rule.prior,
        rule.cluster,
        allowed,
        rows,
        rule.num_clusters,
        rule.cohesion,
        rule.keep,
        **sizes,
        ENTRIES=entries,
        num_warps=8,
    )
    _repick[(rows,)](
        logits,
        rule.bias,
        weights,
        picks,
        kinds,
        allowed,
        new_weights,
        new_picks,
        routed_mass,
        logits.stride(0),
        rule.scale,
        RENORMALIZE=rule.renormalize,
        **scoring,
        num_warps=1,
    )
    _count[(1,)](
        own,
        own_scores,
        new_picks,
        routed_mass,
        kinds,
        counting,
        counted,
        rows,
        EXPERTS_PADDED=padded,
        TOP_K=top_k,
        ENTRIES=entries,
        num_warps=8,
    )
    return new_weights, new_picks
