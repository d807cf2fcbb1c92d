"""Distances between the next-token distributions of a draft model and its target, with their gradients.

Two distances: the forward Kullback-Leibler divergence, whose gradient is large while the distributions are far apart,
and the total variation distance: rejection sampling accepts a draft token with probability one minus that distance
(Leviathan et al. 2023, section 3.5; used for distillation by DistillSpec, Zhou et al. 2024).

The logits of a batch are by far the largest arrays of a training step (tokens × vocabulary). They never exist as a
whole: loss and gradient are computed together for some hundred tokens at a time, and only the gradients of the hidden
states and of the output matrix are kept. The dozen float32 passes between logits and gradient run over so few rows that
they stay in the processor's cache; the matrix products are made for all rows of a chunk, since each reads or writes the
whole output matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

CHUNK = 512
"""Tokens whose logits exist at the same time."""
CACHED_FLOATS = 2**19
"""Elements of the float32 arrays of a distance: three of 2 MB, about the cache of one core."""

FORWARD_KL, TOTAL_VARIATION = "kl", "tv"

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Target states ``[tokens, any]`` → logits ``[tokens, vocabulary]``."""


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
        context: Any, hidden: torch.Tensor, head: torch.Tensor, states: torch.Tensor, target: Logits, which: str
    ) -> torch.Tensor:
        distance, tokens = _DISTANCES[which], hidden.shape[0]
        rows = max(1, CACHED_FLOATS // head.shape[0])
        matrix = head.to(hidden.dtype)
        of_hidden = torch.empty_like(hidden)
        of_head = torch.zeros_like(head, dtype=torch.float32)
        total = 0.0
        for start in range(0, tokens, CHUNK):
            part = hidden[start : start + CHUNK]
            wanted, logits = target(states[start : start + CHUNK]), part @ matrix.T
            for row in range(0, len(part), rows):
                few = slice(row, row + rows)
                loss, gradient = distance(wanted[few].float().softmax(-1), logits[few].float())
                total += loss
                logits[few] = gradient  # in place of what is no longer needed
            of_hidden[start : start + CHUNK] = logits @ matrix
            of_head += logits.T @ part
        context.save_for_backward(of_hidden, of_head)
        context.tokens = tokens
        return torch.tensor(total / tokens, device=hidden.device)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        of_hidden, of_head = context.saved_tensors
        scale = gradients[0] / context.tokens
        return of_hidden * scale, of_head * scale, None, None, None


def head_distance(
    hidden: torch.Tensor, head: torch.Tensor, states: torch.Tensor, target: Logits, which: str
) -> torch.Tensor:
    """Mean distance over tokens, differentiable with respect to ``hidden`` and ``head``.

    Args:
        hidden: the draft's last hidden states, bfloat16 or float32 ``[tokens, width]``.
        head: its output matrix, ``[vocabulary, width]``.
        states: what ``target`` needs to know of the same tokens, ``[tokens, any]``.
        target: gives the target's logits.
        which: ``"kl"`` (nats) or ``"tv"`` (0..1).

    Returns:
        A scalar.

    """
    result: torch.Tensor = _HeadDistance.apply(hidden, head, states, target, which)
    return result
