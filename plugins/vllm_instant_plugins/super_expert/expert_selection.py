"""Which experts the decoding tokens of a step may use: those that somebody must have, then those most wanted.

The rule of ``vllm_instant.tools.moe.budgets`` on tensors, with one thing more: experts that prompts in the same step
pick are paid for, too, whoever else uses them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_instant.interfaces.experts import ExpertLayer, RouterStep, RowKind
from vllm_instant_plugins.jit import compiled

_PREFILL, _DECODE = int(RowKind.PREFILL), int(RowKind.DECODE)


class LayerChoice:
    """One layer's rule; its tensors may be changed while graphs that use them are replayed.

    Args:
        layer: what it is about.
        keep: of its own best experts no token is refused so many.
        prior: positive ``[experts]``: what the demand for each expert is multiplied with; None for all the same.
        cluster: ``[experts]``: the super-expert of each; None without.
        cohesion: how much the demand for its cluster adds to that for an expert.
        device: of the step's tensors.

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
        """Experts that a step may use, as far as it can be kept."""
        self._top_k = layer.top_k
        self._prior = None if prior is None else torch.tensor(prior, dtype=torch.float32, device=device)
        self._company: torch.Tensor | None = None
        if cluster is not None and cohesion > 0:
            of_expert = torch.tensor(cluster, device=device)
            self._company = cohesion * (of_expert[:, None] == of_expert[None]).float()
        # On a CPU a layer's tensors are so small that calling PyTorch takes longer than the work.
        self._on_cpu = device.type == "cpu"
        self._prior_array = np.ones(layer.num_experts, np.float32) if prior is None else np.array(prior, np.float32)
        self._company_array = np.zeros((0, 0), np.float32) if self._company is None else self._company.cpu().numpy()

    def allowed(self, step: RouterStep) -> torch.Tensor:
        """Which experts every row may use: bool, ``[1, experts]``."""
        return self._allowed_by_loops(step) if self._on_cpu else self.allowed_by_tensors(step)

    def _allowed_by_loops(self, step: RouterStep) -> torch.Tensor:
        allowed = allowed_experts(
            step.weights.numpy(),
            step.picks.numpy(),
            step.kinds.numpy(),
            self.keep,
            self.budget.item(),
            self._top_k,
            self._prior_array,
            self._company_array,
        )
        return torch.from_numpy(allowed)[None]

    def allowed_by_tensors(self, step: RouterStep) -> torch.Tensor:
        """The same in tensor operations, which a graph can hold."""
        experts = step.weights.shape[1]
        decoding = step.kinds == RowKind.DECODE
        wanted = step.weights.gather(1, step.picks) * decoding[:, None]
        demand = wanted.new_zeros(experts).scatter_add_(0, step.picks.flatten(), wanted.flatten())
        # Rows of a prompt use what they want; padding wants nothing.
        needed = (step.kinds == RowKind.PREFILL)[:, None].expand_as(step.picks).clone()
        needed[:, : self.keep] |= decoding[:, None]
        kept = demand.new_zeros(experts).scatter_add_(0, step.picks.flatten(), needed.flatten().float()) > 0
        if self._prior is not None:
            demand = demand * self._prior
        if self._company is not None:
            demand = demand * (1.0 + self._company @ demand / demand.sum().clamp(min=1e-30))
        order = torch.where(kept, float("inf"), demand).argsort(descending=True, stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(experts, device=order.device))
        room = torch.maximum(self.budget, kept.sum()).clamp(min=self._top_k)
        return (place < room)[None]


def warm_up() -> None:
    """Compile the loops, or load what was compiled, before a request waits."""
    weights, picks = torch.rand(2, 4), torch.zeros(2, 2, dtype=torch.int64)
    step = RouterStep(weights, weights, picks, weights[:, :2], torch.full((2,), _DECODE, dtype=torch.int8))
    LayerChoice(ExpertLayer(0, "", 4, 2), 1, None, None, 0.0, weights.device).allowed(step)


@compiled
def allowed_experts(
    weights: Any, picks: Any, kinds: Any, keep: int, budget: int, top_k: int, prior: Any, company: Any
) -> Any:
    """``LayerChoice`` in loops, for CPUs: bool ``[experts]``.

    ``company`` is cohesion where two experts are of one cluster, ``[experts, experts]``, or empty.
    """
    tokens, experts = weights.shape
    demand = np.zeros(experts, np.float32)
    kept = np.zeros(experts, np.bool_)
    for token in range(tokens):
        kind = kinds[token]
        for place in range(picks.shape[1]):
            expert = picks[token, place]
            if kind == _PREFILL or (kind == _DECODE and place < keep):
                kept[expert] = True
            if kind == _DECODE:
                demand[expert] += weights[token, expert]
    demand *= prior
    if company.size:
        total = max(demand.sum(), np.float32(1e-30))
        demand *= np.float32(1.0) + company @ demand / total
    for expert in range(experts):
        if kept[expert]:
            demand[expert] = np.inf
    order = np.argsort(-demand, kind="mergesort")
    allowed = np.zeros(experts, np.bool_)
    for place in range(min(experts, max(budget, top_k, kept.sum()))):
        allowed[order[place]] = True
    return allowed
