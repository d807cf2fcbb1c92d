"""Ragged drafts as a rectangle, for rejection samplers that verify a whole step at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PaddedDrafts:
    """Ragged drafts as a rectangle: ``batch`` requests with up to ``longest`` drafts each."""

    number: torch.Tensor
    """int64 ``[batch]``, drafts of each request, padding included."""
    index: torch.Tensor
    """int64 ``[batch, longest]``: the row of each draft in the flat tensors; a valid row also where there is none."""
    token_ids: torch.Tensor
    """int64 ``[batch, longest]``; 0 where there is no draft."""
    num_real: torch.Tensor
    """int64 ``[batch]``, drafts in front of the first padding."""
    is_real: torch.Tensor
    """bool ``[batch, longest]``: the first ``num_real`` of each request."""


def pad_drafts(draft_token_ids: torch.Tensor, num_draft_tokens: Sequence[int]) -> PaddedDrafts:
    """Lay out the drafts of a step, one line a request.

    Args:
        draft_token_ids: int64 ``[total]`` with ``total >= 1``; -1 is padding.
        num_draft_tokens: ``batch`` entries that sum to ``total``.

    """
    import torch

    device = draft_token_ids.device
    # Copied without waiting: a GPU that waits for the host here would be late for the next step.
    number = torch.tensor(num_draft_tokens, dtype=torch.int64).to(device, non_blocking=True)
    position = torch.arange(max(num_draft_tokens), device=device)
    start = number.cumsum(0) - number
    index = (start[:, None] + position).clamp_(max=len(draft_token_ids) - 1)
    token_ids = draft_token_ids[index]
    is_real = ((position < number[:, None]) & (token_ids >= 0)).cumprod(1).bool()
    return PaddedDrafts(number, index, torch.where(is_real, token_ids, 0), is_real.sum(1), is_real)
