"""The ``rejection_sampler`` slot: which draft tokens are accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class VerificationBatch:
    """Draft tokens of one step's sampling requests, with the target's logits and the draft's probabilities.

    The results of greedy requests and of requests with a seed are ignored: their accepted tokens follow from the target
    alone (``patches.rejection_sampler``), unless the sampler decides about them, too. All tensors are on the model's
    device.
    """

    draft_token_ids: torch.Tensor
    """int64 ``[total]``, the requests' drafts concatenated. -1 is padding; it and all later tokens are rejected."""
    num_draft_tokens: Sequence[int]
    """``batch`` numbers that sum to ``total``: draft tokens per request, padding included; 0 is allowed."""
    target_logits: torch.Tensor
    """float32 ``[total, vocabulary]`` at the positions of the draft tokens, after penalties, masks, temperature, top-k
    and top-p; -inf is forbidden. May be overwritten."""
    draft_probs: torch.Tensor | None
    """float32 ``[total, vocabulary]``, the distribution of each draft token; None for deterministic drafts."""


@runtime_checkable
class RejectionSampler(Protocol):
    """Decides which draft tokens are accepted, and which token follows. Runs in every worker process.

    Two members are optional, for lossy samplers whose users allow it:

    - ``verify_greedy(step)``, as ``verify``, for greedy requests. ``step`` has the whole batch, at temperature 1 and
      with ``draft_probs = None``; the results of other requests are ignored.
    - ``keeps_seeds``, a bool: with ``False`` ``verify`` decides about requests with a seed as well.
    """

    def verify(self, step: VerificationBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Verify the drafts of one step.

        Returns:
            int64 ``[batch]``: number of accepted leading draft tokens per request, in ``0..num_draft_tokens``; and
            int64 ``[batch]``: the token that replaces the first rejected one. The latter is ignored where all draft
            tokens are accepted: then vLLM samples the next token from the target.

        """
        ...
