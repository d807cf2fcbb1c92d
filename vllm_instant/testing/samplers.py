"""The contract of a rejection sampler; needs PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_instant.interfaces.rejection_sampler import RejectionSampler, VerificationBatch
from vllm_instant.testing.reachable import ContractError

if TYPE_CHECKING:
    import torch

DRAWS = 40_000
"""Requests of a distribution test."""
DRAFT_TOKENS = 3
VOCABULARY = 5
FALSE_ALARMS = 1e-6
"""Chance that a lossless sampler fails a distribution test, for a seed."""


def check_sampler(
    build: Callable[[], RejectionSampler], *, lossless: bool = True, device: str = "cpu", seed: int = 0
) -> None:
    """Check the contract of a rejection sampler: shapes, types, ranges, untouched drafts, and the distribution.

    Args:
        build: returns a new sampler.
        lossless: whether the tokens that come out must follow the target's distribution exactly; tested on
            ``DRAWS`` requests with drafts of a draft model, and as many with certain drafts.
        device: of the tensors.
        seed: of PyTorch's generators.

    Raises:
        ContractError: with one sentence.

    """
    import torch

    torch.manual_seed(seed)
    for counts in ([1], [3, 0, 2], [4, 4, 4, 4], [2, 7, 0, 1]):
        for certain in (False, True):
            for padding in (False, True):
                _verified(build(), _batch(counts, certain, padding, device))
                if certain and (of_greedy := getattr(build(), "verify_greedy", None)) is not None:
                    _checked(of_greedy, _batch(counts, certain, padding, device))
    if lossless:
        for certain in (False, True):
            _check_distribution(build(), certain, device)


def _batch(counts: list[int], certain: bool, padding: bool, device: str) -> VerificationBatch:
    """Random drafts of requests with these numbers of draft tokens; some tokens are forbidden by the target."""
    import torch

    total, vocabulary = sum(counts), 11
    drafts = torch.randint(vocabulary, (total,), device=device)
    if padding:
        drafts[-1] = -1
    target = torch.randn(total, vocabulary, device=device)
    target[:, 0] = -torch.inf
    draft_probs = None if certain else torch.randn(total, vocabulary, device=device).softmax(-1)
    return VerificationBatch(drafts, tuple(counts), target, draft_probs)


def _verified(sampler: RejectionSampler, step: VerificationBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask a sampler about one step and check its answer."""
    return _checked(sampler.verify, step)


def _checked(
    verify: Callable[[VerificationBatch], tuple[torch.Tensor, torch.Tensor]], step: VerificationBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    drafts, counts = step.draft_token_ids.clone(), list(step.num_draft_tokens)
    probs = None if step.draft_probs is None else step.draft_probs.clone()
    answer = verify(step)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise ContractError("verify() must return a pair of tensors: numbers of kept drafts, and replacements")
    for name, tensor in zip(("the numbers of kept drafts", "the replacements"), answer, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int64 or tuple(tensor.shape) != (len(counts),):
            raise ContractError(f"{name} must be an int64 tensor of shape ({len(counts)},), found {_described(tensor)}")
        if tensor.device != drafts.device:
            raise ContractError(f"{name} must be on {drafts.device}, found {tensor.device}")
    if not torch.equal(step.draft_token_ids, drafts) or (
        probs is not None and step.draft_probs is not None and not torch.equal(step.draft_probs, probs)
    ):
        raise ContractError("verify() changed draft_token_ids or draft_probs; only target_logits may be overwritten")
    _check_values(answer, drafts, counts, step.target_logits.shape[1])
    return answer


def _check_values(
    answer: tuple[torch.Tensor, torch.Tensor], drafts: torch.Tensor, counts: list[int], vocabulary: int
) -> None:
    start = 0
    for count, kept, following in zip(counts, answer[0].tolist(), answer[1].tolist(), strict=True):
        own = drafts[start : start + count].tolist()
        real = own.index(-1) if -1 in own else count
        start += count
        if not 0 <= kept <= real:
            raise ContractError(f"of {real} draft tokens {kept} were kept")
        if kept < count and not 0 <= following < vocabulary:
            raise ContractError(f"a replacement must be a token id in 0..{vocabulary - 1}, found {following}")


def _described(tensor: Any) -> str:
    shape = getattr(tensor, "shape", None)
    return repr(tensor) if shape is None else f"{tensor.dtype} of shape {tuple(shape)}"


def _check_distribution(sampler: RejectionSampler, certain: bool, device: str) -> None:
    """Chi-square test of the tokens that come out, all positions jointly, against the target's distribution."""
    import torch
    from scipy.stats import chisquare

    target = torch.randn(DRAFT_TOKENS, VOCABULARY, device=device).softmax(-1)
    proposal = torch.randn(DRAFT_TOKENS, VOCABULARY, device=device).softmax(-1)
    if certain:
        drafts = proposal.argmax(-1).repeat(DRAWS)
    else:
        drafts = torch.multinomial(proposal, DRAWS, replacement=True).T.reshape(-1)
    step = VerificationBatch(
        drafts, (DRAFT_TOKENS,) * DRAWS, target.log().repeat(DRAWS, 1), None if certain else proposal.repeat(DRAWS, 1)
    )
    kept, following = _verified(sampler, step)
    # Positions behind a replacement are sampled from the target in later steps.
    later = torch.multinomial(target, DRAWS, replacement=True).T
    position = torch.arange(DRAFT_TOKENS, device=device)
    tokens = torch.where(position < kept[:, None], drafts.view(DRAWS, DRAFT_TOKENS), later)
    tokens = torch.where(position == kept[:, None], following[:, None], tokens)
    place = VOCABULARY ** torch.arange(DRAFT_TOKENS - 1, -1, -1, device=device)
    counts = torch.bincount((tokens * place).sum(1), minlength=VOCABULARY**DRAFT_TOKENS).cpu().numpy()
    expected = target[0, :, None, None] * target[1, None, :, None] * target[2, None, None, :]
    chances = expected.double().flatten().cpu().numpy()
    p_value = float(chisquare(counts, chances / chances.sum() * np.float64(DRAWS)).pvalue)
    if p_value < FALSE_ALARMS:
        drafted = "certain drafts" if certain else "drafts of a draft model"
        raise ContractError(
            f"with {drafted} the tokens do not follow the target's distribution (chi-square over {DRAWS} requests, "
            f"p = {p_value:.1g}): the sampler is lossy"
        )
