"""Selects the experts that the decoding tokens of one step may use: first the protected ones, then by demand.

The rule of ``vllm_instant.tools.moe.budgets``, on tensors. In addition, experts picked by prompt tokens of the same
step are always allowed: their weights are loaded in any case.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from vllm_instant.interfaces.experts import ExpertLayer, FusedRoute, RouterStep, RowKind
from vllm_instant_plugins.jit import compiled

_PREFILL, _DECODE = int(RowKind.PREFILL), int(RowKind.DECODE)


class ExpertSelector:
    """The selection of one layer; ``budget`` is a tensor, so that it can change between replays of a CUDA graph.

    Args:
        layer: the layer.
        keep: number of top-ranked experts per token that are never refused.
        prior: positive ``[experts]``: factors on the demand for each expert; None for 1.
        cluster: ``[experts]``: the group of each expert; None for no groups.
        cohesion: weight with which the demand for an expert's group adds to the demand for the expert.
        device: device of the step's tensors.

    """

    def __init__(
        self,
        layer: ExpertLayer,
        keep: int,
        prior: list[float] | None,
        cluster: list[int] | None,
        cohesion: float,
        device: torch.device,
    ) -> None:
        self.keep = min(keep, layer.top_k)
        self.budget = torch.full((), layer.num_experts, dtype=torch.int64, device=device)
        """Number of experts that a step may use, unless more of them are protected."""
        self._top_k = layer.top_k
        self._prior = None if prior is None else torch.tensor(prior, dtype=torch.float32, device=device)
        self._affinity: torch.Tensor | None = None
        self._cluster: torch.Tensor | None = None
        self._cohesion, self._num_clusters = cohesion, 0
        if cluster is not None and cohesion > 0:
            of_expert = torch.tensor(cluster, device=device)
            self._cluster, self._num_clusters = of_expert.to(torch.int32), max(cluster) + 1
            self._affinity = cohesion * (of_expert[:, None] == of_expert[None]).float()
        # On a CPU the overhead of PyTorch calls exceeds the work on a layer's small tensors: numba loops instead.
        self._on_cpu = device.type == "cpu"
        self._prior_array = np.ones(layer.num_experts, np.float32) if prior is None else np.array(prior, np.float32)
        self._affinity_array = np.zeros((0, 0), np.float32) if self._affinity is None else self._affinity.cpu().numpy()

    def allowed(self, step: RouterStep) -> torch.Tensor:
        """Bool ``[1, experts]``: the experts that every row may use."""
        return self._allowed_by_loops(step) if self._on_cpu else self.allowed_by_tensors(step)

    def fused(self, layer: ExpertLayer, bias: torch.Tensor | None, scale: float) -> FusedRoute:
        """The selection, the new picks and the counts of a step in four launches."""
        from vllm_instant_kernels.expert_routing import RoutingRule, route_within_budget

        rule = RoutingRule(
            layer.function,
            bias,
            layer.renormalizes,
            scale,
            self.keep,
            self.budget,
            self._prior,
            self._cluster,
            self._num_clusters,
            self._cohesion,
        )
        return partial(route_within_budget, rule)

    def _allowed_by_loops(self, step: RouterStep) -> torch.Tensor:
        allowed = allowed_experts(
            step.weights.numpy(),
            step.picks.numpy(),
            step.kinds.numpy(),
            self.keep,
            self.budget.item(),
            self._top_k,
            self._prior_array,
            self._affinity_array,
        )
        return torch.from_numpy(allowed)[None]

    def allowed_by_tensors(self, step: RouterStep) -> torch.Tensor:
        """The same in tensor operations, which a CUDA graph can capture."""
        experts = step.weights.shape[1]
        decoding = step.kinds == RowKind.DECODE
        wanted = step.weights.gather(1, step.picks) * decoding[:, None]
        demand = wanted.new_zeros(experts).scatter_add_(0, step.picks.flatten(), wanted.flatten())
        # Protected: all picks of prompt rows, the first ``keep`` picks of decode rows, nothing of padding rows.
        protects = (step.kinds == RowKind.PREFILL)[:, None].expand_as(step.picks).clone()
        protects[:, : self.keep] |= decoding[:, None]
        protected = demand.new_zeros(experts).scatter_add_(0, step.picks.flatten(), protects.flatten().float()) > 0
        if self._prior is not None:
            demand = demand * self._prior
        if self._affinity is not None:
            demand = demand * (1.0 + self._affinity @ demand / demand.sum().clamp(min=1e-30))
        # Rank the experts by demand, protected ones first; a stable sort breaks ties by index.
        order = torch.where(protected, float("inf"), demand).argsort(descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(experts, device=order.device))
        limit = torch.maximum(self.budget, protected.sum()).clamp(min=self._top_k)
        return (rank < limit)[None]


def warm_up() -> None:
    """Compile the numba loops, or load them from numba's cache, before the first request arrives."""
    weights, picks = torch.rand(2, 4), torch.zeros(2, 2, dtype=torch.int64)
    step = RouterStep(weights, weights, picks, weights[:, :2], torch.full((2,), _DECODE, dtype=torch.int8))
    ExpertSelector(ExpertLayer(0, "", 4, 2), 1, None, None, 0.0, weights.device).allowed(step)


@compiled
def allowed_experts(
    weights: Any, picks: Any, kinds: Any, keep: int, budget: int, top_k: int, prior: Any, affinity: Any
) -> Any:
    """``ExpertSelector.allowed`` as loops, for CPUs: bool ``[experts]``.

    ``affinity[i, j]`` is the cohesion if experts i and j are of one group, else 0; it may be empty.
    """
    tokens, experts = weights.shape
    demand = np.zeros(experts, np.float32)
    protected = np.zeros(experts, np.bool_)
    for token in range(tokens):
        kind = kinds[token]
        for place in range(picks.shape[1]):
            expert = picks[token, place]
            if kind == _PREFILL or (kind == _DECODE and place < keep):
                protected[expert] = True
            if kind == _DECODE:
                demand[expert] += weights[token, expert]
    demand *= prior
    if affinity.size:
        # demand_i * (1 + cohesion * share of the demand that goes to the group of i)
        total = max(demand.sum(), np.float32(1e-30))
        demand *= np.float32(1.0) + affinity @ demand / total
    for expert in range(experts):
        if protected[expert]:
            demand[expert] = np.inf
    order = np.argsort(-demand, kind="mergesort")
    allowed = np.zeros(experts, np.bool_)
    for place in range(min(experts, max(budget, top_k, protected.sum()))):
        allowed[order[place]] = True
    return allowed
