"""Batch-aware routing, the NumPy reference: which experts a batch may use in one layer and step.

What runs in a server is tested against it. Every token keeps its own best ``keep`` experts; these are protected for the
whole batch. If there are fewer of them than the budget, the experts with the largest demand of the batch are added.
Each token then picks its top k among the allowed experts. With a budget of 0 this is Opportunistic Expert Activation
(Oncescu et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ExpertSelection:
    """The experts that batches may use in one layer and step.

    Attributes:
        experts: bool ``[..., experts]``: the allowed experts of each batch, the same for all its rows.
        protected: bool ``[..., experts]``: experts that are among the best ``keep`` of a token.
        demand: float64 ``[..., experts]``: the quantity by which the other experts are ranked.

    """

    experts: Mask
    protected: Mask
    demand: npt.NDArray[np.float64]


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Softmax over the last axis, in float64."""
    shifted = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


def ranks(scores: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The rank of every entry along the last axis, 0 for the largest; ties are broken by position."""
    order = np.argsort(-np.asarray(scores), axis=-1, kind="stable").astype(np.int64)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(scores.shape[-1]), order.shape), axis=-1)
    return rank


def select_experts(
    logits: Floats,
    top_k: int,
    keep: int,
    budget: int,
    prior: Floats | None = None,
    padding: Mask | None = None,
    *,
    mass: Floats | None = None,
    cluster: npt.NDArray[np.integer[Any]] | None = None,
    cohesion: float = 0.0,
) -> ExpertSelection:
    """The experts that one batch, or each of several, may use in one layer.

    An expert's demand is the sum of the router weights of the native picks of it, times its prior. With clusters and a
    cohesion above 0 the demand is multiplied by ``1 + cohesion * f``, where ``f`` is the fraction of the batch's demand
    that goes to the expert's cluster: of two experts with equal demand the one in the busier cluster is preferred.

    Args:
        logits: float32 ``[..., tokens, experts]``, one batch per leading index: the scores that the model ranks experts
            by, including its selection bias if it has one.
        top_k: number of experts per token.
        keep: number of top-ranked experts per token that are protected, 0 to ``top_k``.
        budget: number of experts that the batch may use; exceeded if more are protected, and at least ``top_k``.
        prior: positive ``[experts]``: factors on the demand; None for 1.
        padding: bool ``[..., tokens]``: rows without demand of their own; they may use the allowed experts.
        mass: non-negative ``[..., tokens, experts]``: the router weights; by default the softmax of ``logits`` (a model
            with sigmoid scores passes these).
        cluster: ``[experts]``: the cluster of each expert.
        cohesion: strength of the preference for busy clusters.

    Returns:
        ``max(budget, top_k, number of protected experts)`` experts per batch.

    """
    real = ~padding[..., None] if padding is not None else np.ones((*logits.shape[:-1], 1), bool)
    place = ranks(logits)
    protected = np.asarray(((place < keep) & real).any(-2))
    demand = np.where((place < top_k) & real, softmax(logits) if mass is None else mass, 0.0).sum(-2)
    if prior is not None:
        demand = demand * prior
    if cluster is not None and cohesion > 0:
        cluster_share = _by_cluster(demand, cluster)[..., cluster] / np.maximum(demand.sum(-1, keepdims=True), 1e-300)
        demand = demand * (1.0 + cohesion * cluster_share)
    limit = np.maximum(protected.sum(-1, keepdims=True), max(budget, top_k))
    # Protected experts rank first, whatever their demand.
    return ExpertSelection(ranks(np.where(protected, np.inf, demand)) < limit, protected, demand)


def select_clusters(
    logits: Floats,
    top_k: int,
    clusters: int,
    cluster: npt.NDArray[np.integer[Any]],
    padding: Mask | None = None,
    *,
    mass: Floats | None = None,
) -> ExpertSelection:
    """Hard clusters: all experts of the ``clusters`` clusters with the largest demand of the batch, and no others.

    Further clusters are added in order of demand until there are ``top_k`` experts.
    """
    every = select_experts(logits, top_k, 0, logits.shape[-1], padding=padding, mass=mass)
    demand = _by_cluster(every.demand, cluster)
    place = ranks(demand)
    order = np.argsort(place, axis=-1)
    num_experts = np.cumsum(np.bincount(cluster)[order], axis=-1)
    needed = (num_experts < top_k).sum(-1, keepdims=True) + 1
    return ExpertSelection((place < np.maximum(needed, clusters))[..., cluster], every.protected, every.demand)


def _by_cluster(demand: npt.NDArray[np.float64], cluster: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
    """Demand of each cluster, ``[..., clusters]``."""
    return np.asarray(demand @ np.eye(int(np.max(cluster)) + 1)[cluster])


def route(
    logits: Floats, top_k: int, allowed: Mask, *, mass: Floats | None = None, renormalise: bool = True
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Each token's picks among the allowed experts, and their weights.

    Args:
        logits: ``[..., tokens, experts]``.
        top_k: number of picks, at most the number of allowed experts.
        allowed: bool ``[..., experts]``.
        mass: as in ``select_experts``.
        renormalise: whether the weights of a token are divided by their sum. Otherwise experts keep their native
            weights: refusing others must not increase theirs.

    Returns:
        Experts int64 ``[..., tokens, top_k]``, best first, and weights float64 of the same shape.

    """
    masked = np.where(allowed[..., None, :], logits, -np.inf)
    order = np.argsort(-masked, axis=-1, kind="stable").astype(np.int64)[..., :top_k]
    weights = np.take_along_axis(softmax(logits) if mass is None else np.asarray(mass, np.float64), order, -1)
    return order, weights / weights.sum(-1, keepdims=True) if renormalise else weights


def kept_mass(logits: Floats, top_k: int, allowed: Mask, *, mass: Floats | None = None) -> npt.NDArray[np.float64]:
    """Router weights of each token's picks relative to its native picks: ``[..., tokens]``, 0 to 1."""
    scores = softmax(logits) if mass is None else np.asarray(mass, np.float64)
    native = route(logits, top_k, np.ones_like(allowed), mass=scores, renormalise=False)[1]
    restricted = route(logits, top_k, allowed, mass=scores, renormalise=False)[1]
    return np.asarray(restricted.sum(-1) / native.sum(-1))
