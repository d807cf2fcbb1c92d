"""Sampling of the token that replaces a rejected draft token."""

from __future__ import annotations

import torch

from vllm_instant.speculation.verification import PaddedDrafts


def probabilities_of_drafts(probs: torch.Tensor, rows: PaddedDrafts) -> torch.Tensor:
    """The probability of each draft token, ``[batch, longest]``, by ``probs``, ``[total, vocabulary]``; same dtype."""
    return probs[rows.index, rows.token_ids]


def draw(weights: torch.Tensor) -> torch.Tensor:
    """One index per row, with probability proportional to its weight; int64 ``[batch]``.

    By inversion of the cumulative sum: one random number per row, which is a tenth of the work of one random number per
    entry. Sums are in float64, so that rounding moves at most 1e-11 of probability even with 150 thousand entries.

    Args:
        weights: float32 ``[batch, vocabulary]``, not negative, each row with a positive entry.

    """
    totals = weights.cumsum(1, dtype=torch.float64)
    point = torch.rand(len(weights), 1, dtype=torch.float64, device=weights.device) * totals[:, -1:]
    # The first index whose sum exceeds the point; an entry without weight has the same sum as the one before it.
    chosen = torch.searchsorted(totals, point, right=True)[:, 0]
    # A point that rounding put on the end belongs to the last entry with weight.
    return torch.where(chosen < weights.shape[1], chosen, totals.argmax(1))


def replacements(
    rows: PaddedDrafts,
    num_kept: torch.Tensor,
    kept_weight: torch.Tensor | None,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor | None,
) -> torch.Tensor:
    """The token behind the last accepted draft token, sampled from the residual distribution.

    Args:
        rows: the drafts.
        num_kept: accepted draft tokens, int64 ``[batch]``.
        kept_weight: float32 ``[batch]``, the share of the target that counts (block verification); None for 1.
        target_probs: float32 ``[total, vocabulary]``.
        draft_probs: float32 ``[total, vocabulary]``; None where drafts are certain.

    Returns:
        int64 ``[batch]``; meaningless where the whole draft was accepted.

    """
    longest = rows.index.shape[1]
    position = num_kept.clamp(max=longest - 1)[:, None]
    row = rows.index.gather(1, position)[:, 0]
    target = target_probs[row]
    if draft_probs is None:
        rejected = rows.token_ids.gather(1, position)
        rest = target.scatter(1, rejected, 0.0)
    else:
        weighted = target if kept_weight is None else target * kept_weight[:, None]
        rest = (weighted - draft_probs[row]).clamp_min_(0)
    # Behind a whole accepted draft nothing was drafted, so that the target itself is sampled; the same where the
    # residual is 0, which happens when target and draft agree but for rounding.
    whole = (num_kept == rows.num_real) | (rest.amax(1) <= 0)
    return draw(torch.where(whole[:, None], target, rest))
