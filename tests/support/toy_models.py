"""A target and a draft model small enough to know their distributions exactly: each token depends on the one before."""

from __future__ import annotations

import torch

from vllm_instant import VerificationBatch


class ToyPair:
    """Two Markov chains over a few tokens, from the same start.

    Args:
        vocabulary: number of tokens.
        apart: how different the draft model is from the target; 0 is equal.
        seed: of both.

    """

    def __init__(self, vocabulary: int = 4, apart: float = 0.9, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = 1.2 * torch.randn(vocabulary + 1, vocabulary, generator=generator)
        noise = apart * torch.randn(vocabulary + 1, vocabulary, generator=generator)
        self.vocabulary = vocabulary
        self.target = logits.softmax(-1)
        """``[vocabulary + 1, vocabulary]``; the last row is the start."""
        self.draft = (logits + noise).softmax(-1)

    def joint(self) -> torch.Tensor:
        """The target's joint distribution of three tokens, ``[vocabulary ** 3]``."""
        p, v = self.target, self.vocabulary
        return (p[v][:, None, None] * p[:v][:, :, None] * p[:v][None]).flatten()

    def drafts(self, batch: int, length: int) -> torch.Tensor:
        """int64 ``[batch, length]``, drawn from the draft model."""
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        before = torch.full((batch,), self.vocabulary)
        for position in range(length):
            before = tokens[:, position] = torch.multinomial(self.draft[before], 1)[:, 0]
        return tokens

    def step(self, drafts: torch.Tensor, lengths: torch.Tensor, certain: bool = False) -> VerificationBatch:
        """What a sampler gets for the first ``lengths`` of each row of ``drafts``."""
        batch, longest = drafts.shape
        before = torch.cat([torch.full((batch, 1), self.vocabulary), drafts[:, :-1]], 1)
        mask = torch.arange(longest) < lengths[:, None]
        rows = before[mask]
        return VerificationBatch(
            drafts[mask], lengths.tolist(), self.target[rows].log(), None if certain else self.draft[rows]
        )

    def continued(self, drafts: torch.Tensor, lengths: torch.Tensor, kept: torch.Tensor, following: torch.Tensor):
        """Three tokens of each request, ``[batch, 3]``: what was kept, what follows, and then the target alone."""
        said = torch.full((len(drafts), 3), -1)
        before = torch.full((len(drafts),), self.vocabulary)
        for position in range(3):
            alone = torch.multinomial(self.target[before], 1)[:, 0]
            drafted = drafts[:, position] if position < drafts.shape[1] else alone
            replaced = (position == kept) & (kept < lengths)
            before = torch.where(position < kept, drafted, torch.where(replaced, following, alone))
            said[:, position] = before
        return said

    def distance(self, said: torch.Tensor) -> float:
        """Total variation between three tokens as counted and as the target has them."""
        v = self.vocabulary
        outcome = (said[:, 0] * v + said[:, 1]) * v + said[:, 2]
        return float((torch.bincount(outcome, minlength=v**3) / len(said) - self.joint()).abs().sum() / 2)

    def noise(self, batch: int) -> float:
        """What ``distance`` is on average for draws from the target itself (normal approximation)."""
        p = self.joint()
        return float((2 * p * (1 - p) / (torch.pi * batch)).sqrt().sum() / 2)
