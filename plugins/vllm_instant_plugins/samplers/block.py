"""Block verification (Sun et al. 2024, arXiv 2403.10444): a draft is verified as a whole.

A draft token with less probability by the target than by the draft model lowers the weight of the whole draft instead
of only its own acceptance, and tokens with more probability raise it again, so that more of a draft is accepted than by
verification token by token, from the same distribution. With ``P_i`` and ``Q_i`` the target's and the draft model's
distribution behind ``i`` drafts:

- weights ``w_0 = 1``, ``w_i = min(1, w_{i-1} * P_{i-1}(x_i) / Q_{i-1}(x_i))``;
- residual mass ``S_i = sum_x max(w_i * P_i(x) - Q_i(x), 0)``;
- length ``i`` is acceptable with probability ``h_i = S_i / (S_i + 1 - w_i)``, the whole draft with probability ``w_n``,
  independently; the longest acceptable length is accepted, and the next token is sampled from the normalized positive
  part of
  ``w_i * P_i - Q_i``.

The draft's length may depend on the draft tokens before its end, not on tokens that were cut off.

For deterministic drafts ``h_i`` equals verification token by token, which is used instead.
"""

from __future__ import annotations

import torch

from vllm_instant import RejectionSampler, VerificationBatch
from vllm_instant.speculation.verification import PaddedDrafts, pad_drafts
from vllm_instant_plugins.samplers.draws import replacements
from vllm_instant_plugins.samplers.residuals import residual_masses
from vllm_instant_plugins.samplers.token import kept_one_by_one, ratios


class BlockSampler(RejectionSampler):
    """Lossless; accepts as many tokens of a single draft as any lossless rule can."""

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
        rows: the same, padded.
        target_probs: float32 ``[total, vocabulary]``.
        draft_probs: the same of the draft model; None for deterministic drafts.

    """
    if target_probs.is_cuda:
        return _verified_by_kernels(draft_token_ids, rows, target_probs, draft_probs)
    of_drafts = ratios(rows, target_probs, draft_probs)
    if draft_probs is None:
        num_kept = kept_one_by_one(rows, of_drafts)
        return num_kept, replacements(rows, num_kept, None, target_probs, None)
    after = weights(of_drafts)
    uniform = torch.rand_like(after)
    # h_i <= w_i, and h_i = 1 where w_i = 1: only between the two does the residual mass decide.
    decides = (uniform < after) & (after < 1)
    chances = length_chances(rows, after, target_probs, draft_probs, decides)
    acceptable = (uniform < chances) & rows.is_real
    lengths = torch.arange(1, acceptable.shape[1] + 1, device=acceptable.device)
    num_kept = (acceptable * lengths).amax(1)
    kept_weight = torch.cat([torch.ones_like(after[:, :1]), after], 1).gather(1, num_kept[:, None])[:, 0]
    return num_kept, replacements(rows, num_kept, kept_weight.float(), target_probs, draft_probs)


def _verified_by_kernels(
    draft_token_ids: torch.Tensor, rows: PaddedDrafts, target_probs: torch.Tensor, draft_probs: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in four kernel launches, without intermediate results of the size of the distributions."""
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

    In logarithms, repeated ``min(1, w * r)`` is a walk reflected at 0: its position is the distance of the free walk
    ``cumsum(log r)`` from its running maximum (Lindley's recursion).
    """
    walk = of_drafts.log().cumsum(1)
    highest = walk.cummax(1).values.clamp_min(0.0)
    # Behind a ratio of 0 the walk stays at minus infinity, and the weight is 0.
    return (walk - highest).exp()


def length_chances(
    rows: PaddedDrafts,
    after: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    decides: torch.Tensor | None = None,
) -> torch.Tensor:
    """``h_1 … h_n``, float64 ``[batch, longest]``: the probability that each length is acceptable.

    Args:
        rows: the drafts.
        after: ``weights``.
        target_probs: float32 ``[total, vocabulary]``.
        draft_probs: float32 ``[total, vocabulary]``.
        decides: bool ``[batch, longest]``, the entries that are needed; others may be 0 where the weight is below 1.
            All by default.

    """
    # The mass behind i draft tokens belongs to the row of token i + 1, with weight w_i. Rows that need none get 0.
    has_next = rows.is_real[:, 1:]
    summed = has_next if decides is None else has_next & decides[:, :-1]
    of_row = torch.zeros(len(target_probs), dtype=torch.float32, device=target_probs.device)
    of_row.index_add_(0, rows.index[:, 1:].flatten(), torch.where(summed, after[:, :-1], 0.0).float().flatten())
    mass = residual_masses(target_probs, draft_probs, of_row).double()
    missing = 1.0 - after[:, :-1]
    inner = mass[rows.index[:, 1:]]
    # S_i = 0 and w_i = 1: target and draft agree from here, and the next token decides.
    inner_chance = torch.where(inner + missing > 0, inner / (inner + missing), 1.0)
    chances = after.clone()
    chances[:, :-1] = torch.where(has_next, inner_chance, after[:, :-1])
    return chances
