"""How mixture-of-experts models pick experts, and how their picks are held to some of them.

Three families cover what vLLM serves: softmax over all experts, sigmoid, and the square root of softplus; each with or
without a bias that steers the choice but not the weights (DeepSeek-V3), and with or without groups of which a token may
use only the best. PyTorch only, fixed shapes, nothing read back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


@dataclass(frozen=True)
class RouterScoring:
    """The rule by which a layer's router weighs and picks."""

    function: str
    """One of ``FUNCTIONS``."""
    top_k: int
    bias: torch.Tensor | None = None
    """``[experts]``, added for the choice alone."""
    groups: int = 1
    """The experts stand in so many groups of equal size …"""
    top_groups: int = 1
    """… of which a token may use so many."""
    renormalize: bool = True
    """Whether the weights of the picked experts are scaled to sum to 1."""
    scale: float = 1.0
    """What the weights are multiplied with in the end."""

    @property
    def grouped(self) -> bool:
        """Whether groups rule anything out."""
        return self.groups > 1 and self.top_groups < self.groups

    def weights(self, logits: torch.Tensor) -> torch.Tensor:
        """What each expert would weigh before normalisation, float32 ``[tokens, experts]``, never negative."""
        import torch

        logits = logits.float()
        if self.function == "softmax":
            return logits.softmax(-1)
        if self.function == "sigmoid":
            return logits.sigmoid()
        return torch.nn.functional.softplus(logits).sqrt()

    def ranking(self, weights: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """What top-k compares, float32 ``[tokens, experts]``; -inf for what a token may not pick.

        Args:
            weights: as ``weights`` gave them.
            allowed: bool, broadcast over ``weights``: experts that may be picked; all by default. Groups are judged
                by their allowed experts alone.

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
            # As DeepSeek-V3 judges groups: by their two best experts. One allowed expert counts alone.
            two = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values
            value = two.masked_fill(two.isneginf(), 0.0).sum(-1).masked_fill(two[..., 0].isneginf(), float("-inf"))
        best = value.topk(self.top_groups, dim=-1).indices
        usable = value.new_zeros(value.shape).scatter_(1, best, 1.0).bool()
        if allowed is not None:
            # Groups that leave a token too few experts would make it pick forbidden ones.
            enough = (by_group.isfinite() & usable[..., None]).sum((1, 2)) >= self.top_k
            usable = usable | ~enough[:, None]
        return by_group.masked_fill(~usable[..., None], float("-inf")).view(tokens, experts)

    def pick(self, weights: torch.Tensor, ranking: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The picked experts, int64 ``[tokens, top_k]``, the best first, and their final weights in float32."""
        picks = ranking.topk(self.top_k, dim=-1).indices
        picked = weights.gather(1, picks)
        if self.renormalize:
            picked = picked / picked.sum(-1, keepdim=True).clamp(min=1e-20)
        return picks, picked if self.scale == 1.0 else picked * self.scale


def one_hot(picks: torch.Tensor, experts: int) -> torch.Tensor:
    """Bool ``[tokens, experts]``: which experts each token picked; ``picks`` are int64 ``[tokens, top_k]``."""
    return picks.new_zeros((len(picks), experts)).scatter_(1, picks, 1).bool()


def reroute_restricted(
    scoring: RouterScoring, weights: torch.Tensor, picks: torch.Tensor, allowed: torch.Tensor, held: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pick anew where a token's own picks are not all allowed.

    Args:
        scoring: the layer's rule.
        weights: as ``scoring.weights`` gave them.
        picks: what the model would pick, int64 ``[tokens, top_k]``.
        allowed: bool ``[tokens, experts]`` or ``[1, experts]``. A token with fewer than ``top_k`` keeps its picks.
        held: bool ``[tokens]``: which tokens are held to it at all.

    Returns:
        bool ``[tokens]``: whose picks change; int64 ``[tokens, top_k]`` and float32 ``[tokens, top_k]``: the picks and
        weights of those (of others, the same function of what they would be held to).

    """
    allowed = allowed.expand_as(weights)
    held = held & (allowed.sum(-1) >= scoring.top_k)
    changed = held & ~allowed.gather(1, picks).all(-1)
    chosen, chosen_weights = scoring.pick(weights, scoring.ranking(weights, allowed))
    return changed, chosen, chosen_weights
