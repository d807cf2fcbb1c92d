"""The ``rejection_sampler`` slot: which proposals are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from vllm_instant.speculation.verification import VerificationBatch


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
