"""Batches of router logits, and their routing by kernels and by tensor operations, for other processes too."""

from __future__ import annotations

from typing import Any

import torch

from vllm_instant.interfaces.experts import ExpertLayer, RouterStep, RowKind
from vllm_instant.moe.router_scoring import RouterScoring, one_hot, reroute_restricted
from vllm_instant_kernels.expert_routing import RoutingRule, route_within_budget
from vllm_instant_plugins.super_expert.expert_selection import ExpertSelector


def case(seed: int, rows: int, experts: int, top_k: int, function: str, biased: bool) -> tuple[Any, ...]:
    """Logits, native weights and picks in random order, row kinds, bias."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, experts, generator=generator) * 2
    bias = torch.rand(experts, generator=generator) * 0.2 if biased else None
    scoring = RouterScoring(function, top_k, bias)
    scores = scoring.weights(logits)
    picks, weights = scoring.pick(scores, scoring.ranking(scores))
    shuffled = torch.rand(rows, top_k, generator=generator).argsort(-1)
    kinds = torch.tensor([RowKind.PADDING, RowKind.PREFILL, RowKind.DECODE], dtype=torch.int8)
    kinds = kinds[torch.multinomial(torch.tensor([0.1, 0.1, 0.8]), rows, True, generator=generator)]
    return logits, weights.gather(1, shuffled), picks.gather(1, shuffled).int(), kinds, bias


def routed_by_kernels(
    logits: torch.Tensor,
    weights: torch.Tensor,
    picks: torch.Tensor,
    kinds: torch.Tensor,
    bias: torch.Tensor | None,
    function: str,
    keep: int,
    budget: int,
    prior: torch.Tensor | None,
    cluster: torch.Tensor | None,
    cohesion: float,
    counting: float,
) -> tuple[torch.Tensor, ...]:
    """Final weights and picks and the counts of ``route_within_budget``."""
    clusters = 0 if cluster is None else int(cluster.max()) + 1
    rule = RoutingRule(function, bias, True, 1.0, keep, torch.tensor(budget), prior, cluster, clusters, cohesion)
    counted = torch.zeros(4, dtype=torch.float64)
    found = route_within_budget(rule, logits, weights, picks, kinds, torch.tensor(counting), counted)
    return (*found, counted)


def routed_by_tensors(
    logits: torch.Tensor,
    weights: torch.Tensor,
    picks: torch.Tensor,
    kinds: torch.Tensor,
    bias: torch.Tensor | None,
    function: str,
    keep: int,
    budget: int,
    prior: torch.Tensor | None,
    cluster: torch.Tensor | None,
    cohesion: float,
) -> tuple[torch.Tensor, ...]:
    """The same by the tensor operations of a server."""
    top_k, experts = picks.shape[1], logits.shape[1]
    scoring = RouterScoring(function, top_k, bias)
    scores = scoring.weights(logits)
    ranking = scoring.ranking(scores)
    own = picks.long()
    order = ranking.gather(1, own).argsort(dim=-1, descending=True, stable=True)
    own, own_weights = own.gather(1, order), weights.gather(1, order)
    selector = ExpertSelector(
        ExpertLayer(0, "layer", experts, top_k),
        keep,
        None if prior is None else prior.tolist(),
        None if cluster is None else cluster.tolist(),
        cohesion,
        logits.device,
    )
    selector.budget.fill_(budget)
    allowed = selector.allowed_by_tensors(RouterStep(scores, ranking, own, own_weights, kinds))
    held = kinds == RowKind.DECODE
    changed, chosen, chosen_weights = reroute_restricted(scoring, scores, own, allowed, held)
    routed = torch.where(changed[:, None], chosen, own)
    real = held[:, None]
    counts = [(one_hot(p, experts) & real).any(0).sum().double() for p in (own, routed)]
    masses = [(scores.gather(1, p) * real).sum().double() for p in (own, routed)]
    weights = torch.where(changed[:, None], chosen_weights, weights)
    picks = torch.where(changed[:, None], chosen.int(), picks)
    return weights, picks, torch.stack(counts + masses)
