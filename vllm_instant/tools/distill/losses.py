"""Distances between the next-token distributions of a draft model and its target, with their gradients.

Two distances: the forward Kullback-Leibler divergence, whose gradient is large while the distributions are far apart,
and the total variation distance: rejection sampling accepts a draft token with probability one minus that distance
(Leviathan et al. 2023, section 3.5; used for distillation by DistillSpec, Zhou et al. 2024).

The logits of a batch are by far the largest arrays of a training step (tokens × vocabulary). They never exist as a
whole: loss and gradient are computed together for some hundred tokens at a time, which fit into the processor's cache,
and only the gradients of the hidden states and of the output matrix are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

CHUNK = 512
"""Tokens whose distributions exist at the same time."""

FORWARD_KL, TOTAL_VARIATION = "kl", "tv"

Probabilities = Callable[[torch.Tensor], torch.Tensor]
"""Target states ``[tokens, width]`` → float32 probabilities ``[tokens, vocabulary]``."""


def _kl(p: torch.Tensor, logits: torch.Tensor) -> tuple[float, torch.Tensor]:
    log_q = logits.log_softmax(-1)
    # Cross entropy has the same gradient but does not end at zero: the target's entropy is taken off.
    entropy = -torch.special.xlogy(p, p).sum()
    loss = float(-(p * log_q).sum() - entropy)
    return loss, log_q.exp_().sub_(p)


def _tv(p: torch.Tensor, logits: torch.Tensor) -> tuple[float, torch.Tensor]:
    q = logits.softmax(-1)
    difference = q - p
    loss = 0.5 * float(difference.abs().sum())
    weighted = difference.sign_().mul_(q)
    inner = weighted.sum(-1, keepdim=True)
    return loss, weighted.sub_(q.mul_(inner)).mul_(0.5)


_DISTANCES = {FORWARD_KL: _kl, TOTAL_VARIATION: _tv}


class _HeadDistance(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, hidden: torch.Tensor, head: torch.Tensor, states: torch.Tensor, target: Probabilities, which: str
    ) -> torch.Tensor:
        distance, tokens = _DISTANCES[which], hidden.shape[0]
        matrix = head.to(hidden.dtype)
        of_hidden = torch.empty_like(hidden)
        of_head = torch.zeros_like(head, dtype=torch.float32)
        total = 0.0
        for start in range(0, tokens, CHUNK):
            part = hidden[start : start + CHUNK]
            loss, gradient = distance(target(states[start : start + CHUNK]), (part @ matrix.T).float())
            total += loss
            gradient = gradient.to(hidden.dtype)
            of_hidden[start : start + CHUNK] = gradient @ matrix
            of_head += (gradient.T @ part).float()
        context.save_for_backward(of_hidden, of_head)
        context.tokens = tokens
        return torch.tensor(total / tokens, device=hidden.device)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        of_hidden, of_head = context.saved_tensors
        scale = gradients[0] / context.tokens
        return of_hidden * scale, of_head * scale, None, None, None


def head_distance(
    hidden: torch.Tensor, head: torch.Tensor, states: torch.Tensor, target: Probabilities, which: str
) -> torch.Tensor:
    """Mean distance over tokens, differentiable with respect to ``hidden`` and ``head``.

    Args:
        hidden: the draft's last hidden states, bfloat16 or float32 ``[tokens, width]``.
        head: its output matrix, ``[vocabulary, width]``.
        states: what ``target`` needs to know of the same tokens, ``[tokens, any]``.
        target: gives the target's probabilities.
        which: ``"kl"`` (nats) or ``"tv"`` (0..1).

    Returns:
        A scalar.

    """
    result: torch.Tensor = _HeadDistance.apply(hidden, head, states, target, which)
    return result
