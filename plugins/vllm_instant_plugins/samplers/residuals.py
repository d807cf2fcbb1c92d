"""Operations on whole distributions: the only work of a sampler that grows with the vocabulary.

On a CPU a chain of tensor operations would write tens of megabytes of intermediate results; instead one compiled loop
reads each distribution once. Other devices use tensor operations.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from vllm_instant_plugins.jit import compiled_sums

Floats = npt.NDArray[np.float32]

PIECE = 4096
"""Entries that are added up in float32 before their sum joins the others in float64."""


def residual_masses(target_probs: torch.Tensor, draft_probs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``sum_x max(weight * P(x) - Q(x), 0)`` of each row, float32 ``[total]``.

    Args:
        target_probs: ``P``, float32 ``[total, vocabulary]``.
        draft_probs: ``Q``, float32 ``[total, vocabulary]``.
        weight: float32 ``[total]``; rows with weight 0 are not read on a CPU.

    """
    if target_probs.device.type != "cpu":
        return (target_probs * weight[:, None] - draft_probs).clamp_min_(0).sum(1)
    masses = torch.zeros(len(weight), dtype=torch.float32)
    _residual_masses(target_probs.numpy(), draft_probs.contiguous().numpy(), weight.numpy(), masses.numpy())
    return masses


def move_towards(target_probs: torch.Tensor, draft_probs: torch.Tensor, epsilon: float | torch.Tensor) -> None:
    """Move probability ``epsilon`` of each row from where ``P`` exceeds ``Q`` to where ``Q`` exceeds ``P``, in place.

    Less is moved where the total variation is smaller. Nothing is moved to tokens with ``P = 0``.

    Args:
        target_probs: ``P``, float32 ``[total, vocabulary]``; overwritten.
        draft_probs: ``Q``, float32 ``[total, vocabulary]``.
        epsilon: total variation, in 0..1, of all rows or of each, float32 ``[total]``. A CPU reads no row with 0.

    """
    limit = torch.as_tensor(epsilon, dtype=torch.float32, device=target_probs.device).expand(len(target_probs))
    if target_probs.device.type == "cpu":
        _move_towards(target_probs.numpy(), draft_probs.contiguous().numpy(), limit.contiguous().numpy())
        return
    difference = draft_probs - target_probs
    below = torch.where(target_probs > 0, difference, 0.0).clamp_min_(0)
    above = (-difference).clamp_min_(0)
    to_fill, to_take = below.sum(1, keepdim=True), above.sum(1, keepdim=True)
    moved = torch.minimum(torch.minimum(to_fill, to_take), limit[:, None])
    target_probs += below * (moved / to_fill.clamp_min(1e-30)) - above * (moved / to_take.clamp_min(1e-30))


def compile_for(device: str) -> None:
    """Compile the loops of this device before the first request."""
    if device == "cpu":
        even = torch.full((1, 2), 0.5)
        residual_masses(even, even, torch.ones(1))
        move_towards(even, even.clone(), 1.0)


# Slices that begin at 0, and conditional expressions in place of branches: only then does LLVM vectorize the loops,
# which makes them eight times as fast.


@compiled_sums
def _residual_masses(target: Floats, draft: Floats, weight: Floats, masses: Floats) -> None:
    zero = np.float32(0.0)
    for row in range(len(weight)):
        share = weight[row]
        if share == zero:
            continue
        total = 0.0
        for begin in range(0, target.shape[1], PIECE):
            p, q = target[row, begin : begin + PIECE], draft[row, begin : begin + PIECE]
            piece = zero
            for x in range(len(p)):
                rest = share * p[x] - q[x]
                piece += rest if rest > zero else zero
            total += float(piece)
        masses[row] = total


@compiled_sums
def _move_towards(target: Floats, draft: Floats, epsilon: Floats) -> None:
    zero = np.float32(0.0)
    for row in range(len(target)):
        if epsilon[row] <= zero:
            continue
        to_fill, to_take = 0.0, 0.0
        for begin in range(0, target.shape[1], PIECE):
            p, q = target[row, begin : begin + PIECE], draft[row, begin : begin + PIECE]
            fill, take = zero, zero
            for x in range(len(p)):
                gap = q[x] - p[x]
                rise = gap if gap > zero else zero
                fill += rise if p[x] > zero else zero
                take += rise - gap
            to_fill += float(fill)
            to_take += float(take)
        moved = min(float(epsilon[row]), to_fill, to_take)
        if moved <= 0.0:
            continue
        up, down = np.float32(moved / to_fill), np.float32(moved / to_take)
        p, q = target[row], draft[row]
        for x in range(len(p)):
            gap = q[x] - p[x]
            rise = gap if gap > zero else zero
            p[x] += up * (rise if p[x] > zero else zero) + down * (gap - rise)
