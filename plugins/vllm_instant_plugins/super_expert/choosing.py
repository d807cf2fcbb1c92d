"""Which experts the decoding tokens of a step may use: those that somebody must have, then those most wanted.

The rule of ``vllm_instant.experts.budgets`` on tensors, with one thing more: experts that prompts in the same step pick
are paid for, too, whoever else uses them.
"""

from __future__ import annotations

import torch

from vllm_instant import ExpertLayer, RouterStep, RowKind


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

    def allowed(self, step: RouterStep) -> torch.Tensor:
        """Bool ``[1, experts]``."""
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
