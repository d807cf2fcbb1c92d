"""How mixture-of-experts models select experts, and how selections are restricted to some experts.

Three scoring functions cover the models that vLLM supports: softmax over all experts, sigmoid, and the square root of
softplus; each with or without a bias that affects the selection but not the weights (DeepSeek-V3), and with or without
groups of experts of which a token may use only the best. PyTorch only, with fixed shapes and without synchronization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


@dataclass(frozen=True)
class RouterScoring:
    """The rule by which a layer's router weights and selects experts."""

    function: str
    """One of ``FUNCTIONS``."""
    top_k: int
    """Number of experts per token."""
    bias: torch.Tensor | None = None
    """``[experts]``, added to the weights for the selection only."""
    groups: int = 1
    """Number of groups of equal size."""
    top_groups: int = 1
    """Number of groups that a token may use."""
    renormalize: bool = True
    """Whether the weights of the selected experts are scaled to sum to 1."""
    scale: float = 1.0
    """Final factor of the weights."""

    @property
    def grouped(self) -> bool:
        """Whether groups restrict the selection."""
        return self.groups > 1 and self.top_groups < self.groups

    def weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the weights before normalization, float32 ``[tokens, experts]``, not negative."""
        import torch

        logits = logits.float()
        if self.function == "softmax":
            return logits.softmax(-1)
        if self.function == "sigmoid":
            return logits.sigmoid()
        return torch.nn.functional.softplus(logits).sqrt()

    def ranking(self, weights: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """Return the scores of the top-k selection, float32 ``[tokens, experts]``; -inf where it is forbidden.

        Args:
            weights: Result of ``weights``.
            allowed: bool, broadcast over ``weights``: the allowed experts; all by default. A group is scored by its
                allowed experts.

        """
        choice = weights if self.bias is None else weights + self.bias
        if allowed is not None:
            choice = choice.masked_fill(~allowed, float("-inf"))
        if not self.grouped:
            return choice
        tokens, experts = choice.shape
        by_group = choice.view(tokens, self.groups, experts // self.groups)
        if self.bias is None:
            value = by_group.amax(-1)
        else:
            # DeepSeek-V3 scores a group by the sum of its two best experts; a single allowed expert counts alone.
            two = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values
            value = two.masked_fill(two.isneginf(), 0.0).sum(-1).masked_fill(two[..., 0].isneginf(), float("-inf"))
        best = value.topk(self.top_groups, dim=-1).indices
        usable = value.new_zeros(value.shape).scatter_(1, best, 1.0).bool()
        if allowed is not None:
            # If the best groups have fewer than top_k allowed experts, top-k would select forbidden ones.
            enough = (by_group.isfinite() & usable[..., None]).sum((1, 2)) >= self.top_k
            usable = usable | ~enough[:, None]
        return by_group.masked_fill(~usable[..., None], float("-inf")).view(tokens, experts)

    def pick(self, weights: torch.Tensor, ranking: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the selected experts, int64 ``[tokens, top_k]``, the best first, and their final weights, float32."""
        picks = ranking.topk(self.top_k, dim=-1).indices
        picked = weights.gather(1, picks)
        if self.renormalize:
            picked = picked / picked.sum(-1, keepdim=True).clamp(min=1e-20)
        return picks, picked if self.scale == 1.0 else picked * self.scale


def one_hot(picks: torch.Tensor, experts: int) -> torch.Tensor:
    """Return bool ``[tokens, experts]``, True for the selected experts ``picks``, int64 ``[tokens, top_k]``."""
    return picks.new_zeros((len(picks), experts)).scatter_(1, picks, 1).bool()


def reroute_restricted(
    scoring: RouterScoring, weights: torch.Tensor, picks: torch.Tensor, allowed: torch.Tensor, restricted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Select again for tokens whose own selection is not allowed.

    Args:
        scoring: The layer's rule.
        weights: Result of ``scoring.weights``.
        picks: The model's own selection, int64 ``[tokens, top_k]``.
        allowed: bool ``[tokens, experts]`` or ``[1, experts]``: the allowed experts. A token with fewer than ``top_k``
            allowed experts keeps its selection.
        restricted: bool ``[tokens]``: the tokens to which ``allowed`` applies.

    Returns:
        bool ``[tokens]``: the tokens whose selection changes; int64 and float32 ``[tokens, top_k]``: their new experts
        and weights (of the other tokens, the best allowed experts).

    """
    allowed = allowed.expand_as(weights)
    restricted = restricted & (allowed.sum(-1) >= scoring.top_k)
    changed = restricted & ~allowed.gather(1, picks).all(-1)
    chosen, chosen_weights = scoring.pick(weights, scoring.ranking(weights, allowed))
    return changed, chosen, chosen_weights
