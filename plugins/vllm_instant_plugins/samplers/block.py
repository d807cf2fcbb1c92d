"""Verification of a draft as a whole (Sun et al. 2024, arXiv 2403.10444).

A draft token that the target likes less than the draft model did lowers the draft's weight instead of its own chance
alone, and tokens that the target likes more raise it again, so that more of a draft is kept than token by token, from
the same distribution. With ``P_i`` and ``Q_i`` the target's and the draft model's distribution behind ``i`` drafts:

- weights ``w_0 = 1``, ``w_i = min(1, w_{i-1} * P_{i-1}(x_i) / Q_{i-1}(x_i))``;
- residual mass ``S_i = sum_x max(w_i * P_i(x) - Q_i(x), 0)``;
- length ``i`` is acceptable with chance ``h_i = S_i / (S_i + 1 - w_i)``, the whole draft with chance ``w_n``,
  independently; the longest acceptable length is kept, and what follows is drawn from the normalised positive part of
  ``w_i * P_i - Q_i``.

The draft's length may depend on the drafts before its end, not on the tokens that it was cut before.

Where drafts are certain ``h_i`` is what verification token by token comes to, and that is used.
"""

from __future__ import annotations

import torch

from vllm_instant import RejectionSampler, VerificationBatch
from vllm_instant.speculation.verification import PaddedDrafts, pad_drafts
from vllm_instant_plugins.samplers.drawing import replacements
from vllm_instant_plugins.samplers.residuals import residual_masses
from vllm_instant_plugins.samplers.token import kept_one_by_one, ratios


class BlockSampler(RejectionSampler):
    """Lossless, and keeps most of a single draft that any lossless rule can keep."""

    def verify(self, step: VerificationBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``RejectionSampler.verify``."""
        rows = pad_drafts(step.draft_token_ids, step.num_draft_tokens)
        target_probs = step.target_logits.softmax(-1, dtype=torch.float32)
        return verified(step.draft_token_ids, rows, target_probs, step.draft_probs)


def verified(
    draft_token_ids: torch.Tensor, rows: PaddedDrafts, target_probs: torch.Tensor, draft_probs: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``RejectionSampler.verify`` from the probabilities of both models.

    Args:
        draft_token_ids: int64 ``[total]``.
        rows: the same, laid out.
        target_probs: float32 ``[total, vocabulary]``.
        draft_probs: the same of the draft model; None where drafts are certain.

    """
    if target_probs.is_cuda:
        return _verified_by_kernels(draft_token_ids, rows, target_probs, draft_probs)
    of_drafts = ratios(rows, target_probs, draft_probs)
    if draft_probs is None:
        num_kept = kept_one_by_one(rows, of_drafts)
        return num_kept, replacements(rows, num_kept, None, target_probs, None)
    after = weights(of_drafts)
    luck = torch.rand_like(after)
    # A chance is at most the weight, and 1 where the weight is 1: elsewhere the mass decides nothing.
    decides = (luck < after) & (after < 1)
    chances = length_chances(rows, after, target_probs, draft_probs, decides)
    acceptable = (luck < chances) & rows.is_real
    lengths = torch.arange(1, acceptable.shape[1] + 1, device=acceptable.device)
    num_kept = (acceptable * lengths).amax(1)
    kept_weight = torch.cat([torch.ones_like(after[:, :1]), after], 1).gather(1, num_kept[:, None])[:, 0]
    return num_kept, replacements(rows, num_kept, kept_weight.float(), target_probs, draft_probs)


def _verified_by_kernels(
    draft_token_ids: torch.Tensor, rows: PaddedDrafts, target_probs: torch.Tensor, draft_probs: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in four launches, with no intermediate result as large as the distributions."""
    from vllm_instant_kernels.block_verification import verify_blocks

    device = target_probs.device
    noise = torch.empty(len(rows.number), target_probs.shape[1], device=device)
    num_kept, following = verify_blocks(
        draft_token_ids,
        rows.number.cumsum(0).to(torch.int32),
        draft_probs,
        target_probs,
        torch.rand(len(target_probs), device=device),
        noise.exponential_().clamp_min_(1e-30),
    )
    return num_kept.long(), following.long()


def weights(of_drafts: torch.Tensor) -> torch.Tensor:
    """``w_1 … w_n`` from the drafts' ratios, float64 ``[batch, longest]``, without a loop.

    ``min(1, w * r)`` over and over is a walk of logarithms that is held below 0: where it stands is how far the free
    walk is below its highest point so far.
    """
    walk = of_drafts.log().cumsum(1)
    highest = walk.cummax(1).values.clamp_min(0.0)
    # Behind a ratio of 0 the walk is at minus infinity for good, and the weight is 0.
    return (walk - highest).exp()


def length_chances(
    rows: PaddedDrafts,
    after: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    decides: torch.Tensor | None = None,
) -> torch.Tensor:
    """``h_1 … h_n``, float64 ``[batch, longest]``: the chance that each length is acceptable.

    Args:
        rows: the drafts.
        after: ``weights``.
        target_probs: float32 ``[total, vocabulary]``.
        draft_probs: float32 ``[total, vocabulary]``.
        decides: bool ``[batch, longest]``, which chances are asked for; others may come out as 0 where the weight is
            below 1. All by default.

    """
    # The mass behind i drafts is at the row of draft i + 1, which has weight w_i. Rows that do not need one get 0.
    has_next = rows.is_real[:, 1:]
    summed = has_next if decides is None else has_next & decides[:, :-1]
    of_row = torch.zeros(len(target_probs), dtype=torch.float32, device=target_probs.device)
    of_row.index_add_(0, rows.index[:, 1:].flatten(), torch.where(summed, after[:, :-1], 0.0).float().flatten())
    mass = residual_masses(target_probs, draft_probs, of_row).double()
    missing = 1.0 - after[:, :-1]
    inner = mass[rows.index[:, 1:]]
    # Nothing missing and nothing left over: target and draft agree from here, and the next draft decides.
    inner_chance = torch.where(inner + missing > 0, inner / (inner + missing), 1.0)
    chances = after.clone()
    chances[:, :-1] = torch.where(has_next, inner_chance, after[:, :-1])
    return chances
