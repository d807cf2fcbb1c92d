"""Ragged drafts as a rectangle, for rejection samplers that verify a whole step at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PaddedDrafts:
    """Drafts of ``batch`` requests, padded to ``longest`` draft tokens each."""

    number: torch.Tensor
    """int64 ``[batch]``: draft tokens per request, padding included."""
    index: torch.Tensor
    """int64 ``[batch, longest]``: row of each draft token in the flat tensors; any valid row where there is none."""
    token_ids: torch.Tensor
    """int64 ``[batch, longest]``: draft token ids; 0 where there is none."""
    num_real: torch.Tensor
    """int64 ``[batch]``: draft tokens before the first padding."""
    is_real: torch.Tensor
    """bool ``[batch, longest]``: True for the first ``num_real`` positions of each request."""


def pad_drafts(draft_token_ids: torch.Tensor, num_draft_tokens: Sequence[int]) -> PaddedDrafts:
    """Pad the concatenated drafts of a step to one row per request.

    Args:
        draft_token_ids: int64 ``[total]`` with ``total >= 1``; -1 is padding.
        num_draft_tokens: ``batch`` numbers that sum to ``total``.

    """
    import torch

    device = draft_token_ids.device
    # A blocking copy would synchronize with the device and delay the next step.
    number = torch.tensor(num_draft_tokens, dtype=torch.int64).to(device, non_blocking=True)
    position = torch.arange(max(num_draft_tokens), device=device)
    start = number.cumsum(0) - number
    index = (start[:, None] + position).clamp_(max=len(draft_token_ids) - 1)
    token_ids = draft_token_ids[index]
    is_real = ((position < number[:, None]) & (token_ids >= 0)).cumprod(1).bool()
    return PaddedDrafts(number, index, torch.where(is_real, token_ids, 0), is_real.sum(1), is_real)
