"""A speculative cascade: the draft model answers where a deferral rule trusts it, within a bound that the user names.

Narasimhan et al., "Faster Cascades via Speculative Decoding" (ICLR 2025, arXiv 2405.19261), put the deferral rule of a
cascade inside verification: a position is either deferred to the target or left to the draft model, and what the rule
makes of both distributions is verified without loss. Here the rule decides *where* the target's distribution may move
towards the draft model's, and a bound decides *how far*.

**The rules.** Let ``P`` be the target's distribution of a token given everything before it and ``Q`` the draft model's.
Serving ``Q`` instead of ``P`` costs an expected 0-1 loss, and saves a rejection, which verification without loss has
with probability ``D = TV(P, Q) = sum max(P - Q, 0)`` (Leviathan et al. 2023). With ``alpha`` as the loss that one
rejection is worth, deferring is right exactly if ``loss(Q) > loss(P) + alpha * D``. The losses are not known; each
model's own estimate of its 0-1 loss is ``1 - max Q`` and ``1 - max P`` (Chow 1970 for a single model), hence

- ``opt`` keeps the draft model's distribution where ``max Q >= max P - alpha * D``;
- ``chow``, which asks the draft model alone, where ``max Q >= 1 - alpha``;
- ``token`` decides for each token ``v`` by the target: it is left to the draft model where
  ``P(v) >= (1 - alpha) max P``. The draft model's other probability,
  ``eta = sum of Q(v) over the other v``, is sampled from the target, so that the
  cascade's distribution is ``R(v) = Q(v) [P(v) >= (1 - alpha) max P] + eta * P(v)``, which sums to 1.

For ``chow`` and ``opt`` the cascade's distribution is ``R = Q`` where the draft model is kept and ``R = P`` where the
position is deferred.

**The bound.** The sampler serves ``P'``, which is ``P`` with probability ``m`` moved towards ``R``: from the tokens
where ``P > R``, in proportion to ``P - R``, to those where ``R > P > 0``, in proportion to ``R - P``, with
``m = min(epsilon, sum of the latter differences)``. So ``sum |P' - P| / 2 = m <= epsilon`` at every position, whatever
the rule says. The draft is verified against ``P'`` by the lossless block rule, which serves exactly ``P'``, whatever
the drafts are. Hence:

- each token's distribution, given the tokens before it, is within ``epsilon`` of the target's in total variation, and
  equal to it at deferred positions;
- the joint distribution of an answer of ``n`` tokens is within ``n * epsilon``, more precisely within the expected sum
  of ``m`` over its positions. It is no bound on a whole answer's quality.

**Special cases.** ``chow`` with ``alpha >= 1`` never defers, and is ``relaxed``. ``epsilon = 1`` removes the bound, and
is the cascade of the paper. ``epsilon = 0``, and a rule that always defers, are ``block``.

**Deterministic drafts** (lookups, greedy drafts, drafts of structured output) have the one-hot distribution of their
token, with confidence 1: ``chow`` and ``opt`` always keep it within the bound, and ``token`` asks the target.

**Greedy requests** keep a draft token only if it is the target's first choice, and **requests with a seed** only if it
is the token that the seed gives, unless the user says otherwise. With ``greedy = "cascade"`` a draft token is kept
where ``P(x) >= max P - epsilon`` at temperature 1, and for ``token`` also ``P(x) >= (1 - alpha) max P``. The bound of
these requests is on the probability that a token lacks, not on total variation: a deterministic choice has none in
between. With ``seeded = "cascade"`` such requests are sampled like others, and a seed does not repeat an answer.
"""

from __future__ import annotations

from typing import Literal

import torch

from vllm_instant import RejectionSampler, VerificationBatch
from vllm_instant.speculation.verification import pad_drafts
from vllm_instant_plugins.samplers import block
from vllm_instant_plugins.samplers.draws import probabilities_of_drafts
from vllm_instant_plugins.samplers.relaxed import verified_certain
from vllm_instant_plugins.samplers.residuals import move_towards, residual_masses

Rule = Literal["chow", "opt", "token"]


class CascadeSampler(RejectionSampler):
    """Lossy within a bound; see the module for the rules, their derivation and what the bound is of.

    Args:
        rule: the deferral rule.
        alpha: how readily the draft model is kept; at least 0, and higher for more.
        epsilon: limit of the total variation of each token's distribution, in 0..1.
        keeps_seeds: whether requests with a seed get what the seed gives without drafts.

    """

    def __init__(self, rule: Rule, alpha: float, epsilon: float, keeps_seeds: bool = True) -> None:
        self.rule = rule
        self.alpha = alpha
        self.epsilon = epsilon
        self.keeps_seeds = keeps_seeds

    def verify(self, step: VerificationBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``RejectionSampler.verify``."""
        rows = pad_drafts(step.draft_token_ids, step.num_draft_tokens)
        target_probs = step.target_logits.softmax(-1, dtype=torch.float32)
        if step.draft_probs is None:
            epsilon = self.epsilon
            if self.rule == "token":
                drafted = probabilities_of_drafts(target_probs, rows)
                least = (1 - self.alpha) * target_probs.amax(1)[rows.index]
                return verified_certain(rows, target_probs, (drafted >= least) * epsilon)
            return verified_certain(rows, target_probs, epsilon)
        self.bend(target_probs, step.draft_probs)
        return block.verified(step.draft_token_ids, rows, target_probs, step.draft_probs)

    def bend(self, target_probs: torch.Tensor, draft_probs: torch.Tensor) -> None:
        """Replace the target's distributions ``P`` by what is served, ``P'``.

        Args:
            target_probs: float32 ``[total, vocabulary]``; overwritten.
            draft_probs: float32 ``[total, vocabulary]``.

        """
        if self.epsilon <= 0:
            return
        highest = target_probs.amax(1)
        if self.rule == "token":
            is_kept = target_probs >= (1 - self.alpha) * highest[:, None]
            cascade = torch.where(is_kept, draft_probs, 0.0)
            eta = (1 - cascade.sum(1, keepdim=True)).clamp_min_(0)
            move_towards(target_probs, cascade.add_(target_probs * eta), self.epsilon)
            return
        confidence = draft_probs.amax(1)
        if self.rule == "chow":
            keeps = confidence >= 1 - self.alpha
        else:
            distance = residual_masses(target_probs, draft_probs, torch.ones_like(confidence))
            keeps = confidence >= highest - self.alpha * distance
        move_towards(target_probs, draft_probs, keeps * self.epsilon)


class GreedyCascadeSampler(CascadeSampler):
    """The same, for greedy requests as well."""

    def verify_greedy(self, step: VerificationBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``RejectionSampler``."""
        rows = pad_drafts(step.draft_token_ids, step.num_draft_tokens)
        target_probs = step.target_logits.softmax(-1, dtype=torch.float32)
        highest, first_choice = target_probs.max(1)
        least = highest - self.epsilon
        if self.rule == "token":
            least = torch.maximum(least, (1 - self.alpha) * highest)
        drafted = probabilities_of_drafts(target_probs, rows)
        # A forbidden token stays impossible, also where the bound is 1.
        is_kept = (drafted >= least[rows.index]) & (drafted > 0) & rows.is_real
        num_kept = is_kept.cumprod(1).sum(1)
        position = num_kept.clamp(max=rows.index.shape[1] - 1)[:, None]
        return num_kept, first_choice[rows.index].gather(1, position)[:, 0]
