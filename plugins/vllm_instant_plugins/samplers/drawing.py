"""Drawing the token that takes the place of a refused draft."""

from __future__ import annotations

import torch

from vllm_instant.speculation.verification import PaddedDrafts


def probabilities_of_drafts(probs: torch.Tensor, rows: PaddedDrafts) -> torch.Tensor:
    """What ``probs``, ``[total, vocabulary]``, says of each draft token: ``[batch, longest]``, same dtype."""
    return probs[rows.index, rows.token_ids]


def draw(weights: torch.Tensor) -> torch.Tensor:
    """One index a row, with a chance in proportion to its weight; int64 ``[batch]``.

    By inversion: one random number a row, which is a tenth of the work of one random number an entry. Sums are in
    float64, so that rounding moves no more than 1e-11 of chance even with 150 thousand entries.

    Args:
        weights: float32 ``[batch, vocabulary]``, not negative, some of each row positive.

    """
    totals = weights.cumsum(1, dtype=torch.float64)
    point = torch.rand(len(weights), 1, dtype=torch.float64, device=weights.device) * totals[:, -1:]
    # The first index whose sum exceeds the point; entries without weight exceed nothing that those before do not.
    chosen = torch.searchsorted(totals, point, right=True)[:, 0]
    # A point that rounding put on the very end belongs to the last entry with weight.
    return torch.where(chosen < weights.shape[1], chosen, totals.argmax(1))


def replacements(
    rows: PaddedDrafts,
    num_kept: torch.Tensor,
    kept_weight: torch.Tensor | None,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor | None,
) -> torch.Tensor:
    """The token behind the last kept draft, drawn from what the kept drafts have left of the target.

    Args:
        rows: the drafts.
        num_kept: int64 ``[batch]``.
        kept_weight: float32 ``[batch]``, the share of the target that counts (block verification); None for 1.
        target_probs: float32 ``[total, vocabulary]``.
        draft_probs: float32 ``[total, vocabulary]``; None where drafts are certain.

    Returns:
        int64 ``[batch]``; meaningless where every draft was kept.

    """
    longest = rows.index.shape[1]
    position = num_kept.clamp(max=longest - 1)[:, None]
    row = rows.index.gather(1, position)[:, 0]
    target = target_probs[row]
    if draft_probs is None:
        refused = rows.token_ids.gather(1, position)
        rest = target.scatter(1, refused, 0.0)
    else:
        weighted = target if kept_weight is None else target * kept_weight[:, None]
        rest = (weighted - draft_probs[row]).clamp_min_(0)
    # Padding was drawn from nothing, so that it takes nothing away. Nor is there a rest when target and draft agree but
    # for rounding.
    whole = (num_kept == rows.num_real) | (rest.amax(1) <= 0)
    return draw(torch.where(whole[:, None], target, rest))
