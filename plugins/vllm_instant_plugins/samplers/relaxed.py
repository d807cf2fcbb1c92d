"""A bounded lossy rule: the target is moved towards the draft by at most ``epsilon`` of total variation per token.

**The bound.** Let ``P`` be the target's distribution of a token given everything before it, ``Q`` the draft model's
and ``epsilon`` the budget. Instead of ``P`` the sampler serves ``P'``, which is ``P`` with probability ``m`` moved from
the tokens where ``P > Q`` (each gives in proportion to ``P - Q``) to those where ``Q > P > 0`` (each gets in proportion
to ``Q - P``), with ``m = min(epsilon, sum of the latter differences)``. So ``sum |P' - P| / 2 = m <= epsilon``. The
draft is then verified against ``P'`` by the lossless block rule, which serves exactly ``P'``, whatever the drafts are.
Hence each token's distribution, given the tokens before it, is within ``epsilon`` of the target's in total variation;
over an answer of ``n`` tokens the joint distributions differ by at most ``n * epsilon`` in total variation.

**It is the best use of the budget.** A draft token is accepted with probability ``sum min(P', Q)``, which no ``P'``
within the budget raises by more than ``epsilon``; here it rises by exactly ``m``, because no entry crosses ``Q``.

**What stays exact.** ``epsilon = 0`` is ``block``. Tokens with ``P = 0`` stay impossible, whether a grammar,
``allowed_token_ids``, top-k or top-p forbids them. Greedy requests and requests with a seed are verified without loss.

With deterministic drafts (``Q`` one-hot at ``x``) the rule reads ``P'(x) = P(x) + min(epsilon, 1 - P(x))`` if ``P(x) >
0``.
"""

from __future__ import annotations

import torch

from vllm_instant import RejectionSampler, VerificationBatch
from vllm_instant.speculation.verification import PaddedDrafts, pad_drafts
from vllm_instant_plugins.samplers import block
from vllm_instant_plugins.samplers.draws import replacements
from vllm_instant_plugins.samplers.residuals import move_towards
from vllm_instant_plugins.samplers.token import kept_one_by_one, ratios


class RelaxedSampler(RejectionSampler):
    """Lossy within a bound; see the module for the rule and its derivation.

    Args:
        epsilon: limit of the total variation of each token's distribution, in 0..1.

    """

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def verify(self, step: VerificationBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``RejectionSampler.verify``."""
        rows = pad_drafts(step.draft_token_ids, step.num_draft_tokens)
        target_probs = step.target_logits.softmax(-1, dtype=torch.float32)
        if step.draft_probs is None:
            return verified_certain(rows, target_probs, self.epsilon)
        if self.epsilon > 0:
            move_towards(target_probs, step.draft_probs, self.epsilon)
        return block.verified(step.draft_token_ids, rows, target_probs, step.draft_probs)


def verified_certain(
    rows: PaddedDrafts, target_probs: torch.Tensor, epsilon: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``RejectionSampler.verify`` of deterministic drafts.

    Args:
        rows: the drafts.
        target_probs: float32 ``[total, vocabulary]``.
        epsilon: total variation of all tokens or of each, float32 ``[batch, longest]``.

    """
    chances = ratios(rows, target_probs, None)
    # The other tokens keep their proportions, so that the residual is the same as without relaxation.
    relaxed = torch.where(chances > 0, (chances + epsilon).clamp(max=1.0), chances)
    num_kept = kept_one_by_one(rows, relaxed)
    return num_kept, replacements(rows, num_kept, None, target_probs, None)
