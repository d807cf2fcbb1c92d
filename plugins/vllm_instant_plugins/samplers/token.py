"""Verification token by token (Leviathan et al. 2023, arXiv 2211.17192).

Draft token ``x`` is accepted with probability ``min(1, P(x) / Q(x))``; the first rejected one is replaced by a sample
from the normalized positive part of ``P - Q``. vLLM's own sampler does the same and prepares a replacement for every
draft token; here one is sampled per request.
"""

from __future__ import annotations

import torch

from vllm_instant import RejectionSampler, VerificationBatch
from vllm_instant.speculation.verification import PaddedDrafts, pad_drafts
from vllm_instant_plugins.samplers.draws import probabilities_of_drafts, replacements


class TokenSampler(RejectionSampler):
    """Lossless, and optimal for deterministic drafts."""

    def verify(self, step: VerificationBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``RejectionSampler.verify``."""
        rows = pad_drafts(step.draft_token_ids, step.num_draft_tokens)
        target_probs = step.target_logits.softmax(-1, dtype=torch.float32)
        num_kept = kept_one_by_one(rows, ratios(rows, target_probs, step.draft_probs))
        return num_kept, replacements(rows, num_kept, None, target_probs, step.draft_probs)


def ratios(rows: PaddedDrafts, target_probs: torch.Tensor, draft_probs: torch.Tensor | None) -> torch.Tensor:
    """``P(x) / Q(x)`` of each draft token, float64 ``[batch, longest]``; 0 for what no draft model can have drawn."""
    target = probabilities_of_drafts(target_probs, rows).double()
    if draft_probs is None:
        return target * rows.is_real
    draft = probabilities_of_drafts(draft_probs, rows).double()
    return torch.where((draft > 0) & rows.is_real, target / draft, 0.0)


def kept_one_by_one(rows: PaddedDrafts, chances: torch.Tensor) -> torch.Tensor:
    """How many leading drafts are kept when each is kept with its own chance; int64 ``[batch]``."""
    # Strictly smaller: a chance of 0 keeps nothing, not even when the random number is 0.
    kept = (torch.rand_like(chances) < chances) & rows.is_real
    return kept.cumprod(1).sum(1)
