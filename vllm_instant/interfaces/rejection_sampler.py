"""The ``rejection_sampler`` slot: which proposals are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class VerificationBatch:
    """The drafts of one step of requests that sample, with what both models say of them.

    Greedy requests and requests with a seed are not among them: what is kept of their drafts follows from the target
    alone, whatever sampler is chosen (``patches.rejection_sampler``). All tensors are on the model's device.
    """

    draft_token_ids: torch.Tensor
    """int64 ``[total]``, the requests' drafts one after the other. -1 is padding: it and all behind it is refused."""
    num_draft_tokens: Sequence[int]
    """Drafts of each request, padding included, 0 allowed; ``batch`` entries that sum to ``total``."""
    target_logits: torch.Tensor
    """float32 ``[total, vocabulary]`` after penalties, masks, temperature, top-k and top-p: -inf is forbidden. Each row
    belongs to the position of its draft token. May be overwritten."""
    draft_probs: torch.Tensor | None
    """float32 ``[total, vocabulary]``, what each draft token was drawn from; None where drafts are certain."""


@runtime_checkable
class RejectionSampler(Protocol):
    """Decides which draft tokens are kept, and what follows them. Runs in every worker process."""

    def verify(self, step: VerificationBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Verify one step.

        Returns:
            int64 ``[batch]``: how many leading drafts each request keeps, in ``0..num_draft_tokens``; and int64
            ``[batch]``: the token that takes the place of the first one refused. The latter is ignored where
            every draft is kept: what follows then is sampled from the target as ever.

        """
        ...
