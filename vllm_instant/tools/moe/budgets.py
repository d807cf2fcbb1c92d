"""Batch-aware routing, the reference: which experts a batch may use in one layer and step.

Plain NumPy, written to be read; what runs in a server is tested against it. The rule: every token keeps its own best
``keep`` experts. The experts that are kept so are paid for, whoever wanted them. While there are fewer than the budget,
those are added that the batch as a whole wants most. Each token then chooses its top k among what is there (Oncescu et
al. 2025, "Opportunistic Expert Activation", is this rule with a budget of nothing).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Allowed:
    """What batches may use in one layer and step.

    Attributes:
        experts: bool ``[..., experts]``, the same for every row of a batch.
        kept: bool ``[..., experts]``, those that some token may not be refused.
        demand: float64 ``[..., experts]``, what the others were ranked by.

    """

    experts: Mask
    kept: Mask
    demand: npt.NDArray[np.float64]


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Over the last axis, in float64."""
    shifted = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


def ranks(scores: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The rank of every entry along the last axis, 0 for the largest; of equal ones the first comes first."""
    order = np.argsort(-np.asarray(scores), axis=-1, kind="stable").astype(np.int64)
    found = np.empty_like(order)
    np.put_along_axis(found, order, np.broadcast_to(np.arange(scores.shape[-1]), order.shape), axis=-1)
    return found


def choose(
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
) -> Allowed:
    """Which experts one batch, or each of several, may use in one layer.

    An expert's demand is the router mass that the batch's native choices give it, times its prior. With clusters and
    a cohesion above zero, demand is multiplied with ``1 + cohesion * share``, where ``share`` is the part of the whole
    batch's demand that the expert's cluster has: of two experts that are wanted alike, the one in the company of
    others that are used wins.

    Args:
        logits: float32 ``[..., tokens, experts]``, one batch for each leading index; what the model chooses by (with
            the bias, where it has one for that).
        top_k: experts that a token chooses.
        keep: how many of its own best experts no token is refused, 0 to ``top_k``.
        budget: experts that the batch may use, as far as it can be kept: the experts of ``keep`` are allowed also
            beyond it, and never fewer than ``top_k``.
        prior: positive ``[experts]``, or None for all the same.
        padding: bool ``[..., tokens]``, rows that are no tokens: they want nothing. They may use what is allowed.
        mass: not negative ``[..., tokens, experts]``, how much of a token's answer comes from an expert; the softmax
            of ``logits`` without it (a model that scores by a sigmoid passes that).
        cluster: ``[experts]``, the super-expert of each.
        cohesion: see above.

    Returns:
        ``max(budget, top_k, experts kept by some token)`` experts for each batch.

    """
    real = ~padding[..., None] if padding is not None else np.ones((*logits.shape[:-1], 1), bool)
    place = ranks(logits)
    kept = np.asarray(((place < keep) & real).any(-2))
    demand = np.where((place < top_k) & real, softmax(logits) if mass is None else mass, 0.0).sum(-2)
    if prior is not None:
        demand = demand * prior
    if cluster is not None and cohesion > 0:
        company = _by_cluster(demand, cluster)[..., cluster] / np.maximum(demand.sum(-1, keepdims=True), 1e-300)
        demand = demand * (1.0 + cohesion * company)
    room = np.maximum(kept.sum(-1, keepdims=True), max(budget, top_k))
    # Kept experts come first, whatever the demand for them.
    return Allowed(ranks(np.where(kept, np.inf, demand)) < room, kept, demand)


def choose_clusters(
    logits: Floats,
    top_k: int,
    clusters: int,
    cluster: npt.NDArray[np.integer[Any]],
    padding: Mask | None = None,
    *,
    mass: Floats | None = None,
) -> Allowed:
    """The hard form: only the experts of the ``clusters`` super-experts that the batch wants most.

    More clusters are taken, in the order of demand, when those do not have ``top_k`` experts together.
    """
    every = choose(logits, top_k, 0, logits.shape[-1], padding=padding, mass=mass)
    demand = _by_cluster(every.demand, cluster)
    place = ranks(demand)
    order = np.argsort(place, axis=-1)
    room = np.cumsum(np.bincount(cluster)[order], axis=-1)
    needed = (room < top_k).sum(-1, keepdims=True) + 1
    return Allowed((place < np.maximum(needed, clusters))[..., cluster], every.kept, every.demand)


def _by_cluster(demand: npt.NDArray[np.float64], cluster: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
    """Sums over the experts of each cluster, ``[..., clusters]``."""
    return np.asarray(demand @ np.eye(int(np.max(cluster)) + 1)[cluster])


def route(
    logits: Floats, top_k: int, allowed: Mask, *, mass: Floats | None = None, renormalise: bool = True
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Each token's choice among the allowed experts, and the weights of these.

    Args:
        logits: ``[..., tokens, experts]``.
        top_k: how many, at most as many as are allowed.
        allowed: bool ``[..., experts]``.
        mass: as in ``choose``.
        renormalise: whether the weights of a token are divided by their sum. Where a model does not do that, the
            weights are those that the experts have natively: refusing others must not make these count for more.

    Returns:
        Experts int64 ``[..., tokens, top_k]``, best first, and weights float64 of the same shape.

    """
    masked = np.where(allowed[..., None, :], logits, -np.inf)
    order = np.argsort(-masked, axis=-1, kind="stable").astype(np.int64)[..., :top_k]
    weights = np.take_along_axis(softmax(logits) if mass is None else np.asarray(mass, np.float64), order, -1)
    return order, weights / weights.sum(-1, keepdims=True) if renormalise else weights


def kept_mass(logits: Floats, top_k: int, allowed: Mask, *, mass: Floats | None = None) -> npt.NDArray[np.float64]:
    """Router mass of what each token chooses, relative to its native choice: ``[..., tokens]``, 0..1."""
    scores = softmax(logits) if mass is None else np.asarray(mass, np.float64)
    native = route(logits, top_k, np.ones_like(allowed), mass=scores, renormalise=False)[1]
    restricted = route(logits, top_k, allowed, mass=scores, renormalise=False)[1]
    return np.asarray(restricted.sum(-1) / native.sum(-1))
