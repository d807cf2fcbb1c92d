"""The sampler ``cascade``: its rules, its bound, and what is served, against formulas written down again in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_models import ToyPair

from vllm_instant import VerificationBatch
from vllm_instant_plugins.samplers.block import BlockSampler
from vllm_instant_plugins.samplers.cascade import CascadeSampler, GreedyCascadeSampler
from vllm_instant_plugins.samplers.relaxed import RelaxedSampler

BATCH = 25_000
RULES = ("chow", "opt", "token")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def _served(p, q, rule, alpha, epsilon):
    """The distribution that the module's text promises for one position, and whether it is deferred."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    distance = np.maximum(p - q, 0).sum()
    if rule == "token":
        is_kept = p >= (1 - alpha) * p.max()
        cascade = np.where(is_kept, q, 0) + p * q[~is_kept].sum()
    else:
        keeps = q.max() >= (1 - alpha if rule == "chow" else p.max() - alpha * distance)
        cascade = q if keeps else p
    rise = np.where(p > 0, np.maximum(cascade - p, 0), 0)
    fall = np.maximum(p - cascade, 0)
    moved = min(epsilon, rise.sum(), fall.sum())
    if moved <= 0:
        return p
    return p + moved * (rise / rise.sum() - fall / fall.sum())


def _margin(p, q, rule, alpha):
    """How far a position is from the border of its rule; rounding may decide at the border."""
    if rule == "token":
        return np.abs(p - (1 - alpha) * p.max()).min()
    border = 1 - alpha if rule == "chow" else p.max() - alpha * np.maximum(p - q, 0).sum()
    return abs(q.max() - border)


@given(
    st.integers(2, 300), st.sampled_from(RULES), st.floats(0, 1.2), st.floats(0, 1), st.integers(0, 9999), st.booleans()
)
def test_what_is_served_is_what_is_derived_and_stays_within_the_bound(vocabulary, rule, alpha, epsilon, seed, masked):
    generator = torch.Generator().manual_seed(seed)
    target, draft = ((2 * torch.randn(3, vocabulary, generator=generator)).softmax(-1) for _ in range(2))
    if masked:
        target[:, 1::3] = 0
        target /= target.sum(1, keepdim=True)
    served = target.clone()
    CascadeSampler(rule, alpha, epsilon).bend(served, draft)
    assert float((served - target).abs().sum(1).max()) / 2 <= epsilon + 1e-5
    torch.testing.assert_close(served.sum(1), target.sum(1), atol=1e-5, rtol=1e-5)
    assert not (served[target == 0] > 0).any()
    for row in range(3):
        p, q = target[row].double().numpy(), draft[row].double().numpy()
        if _margin(p, q, rule, alpha) > 1e-5:
            np.testing.assert_allclose(served[row].numpy(), _served(p, q, rule, alpha, epsilon), atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_joint_distribution_is_the_bent_one(rule):
    pair = ToyPair(apart=1.5)
    sampler = CascadeSampler(rule, 0.35, 0.2)
    drafts, lengths = pair.drafts(BATCH, 3), torch.full((BATCH,), 3)
    kept, following = sampler.verify(pair.step(drafts, lengths))
    exact = pair.distance(pair.continued(drafts, lengths, kept, following))
    # Tokens behind a rejected draft are drafted again, and follow the same distribution.
    pair.target = torch.from_numpy(
        np.stack([_served(p, q, rule, 0.35, 0.2) for p, q in zip(pair.target, pair.draft, strict=True)])
    ).float()
    said = pair.continued(drafts, lengths, kept, following)
    assert pair.distance(said) < 1.6 * pair.noise(BATCH) < exact


def test_deferred_positions_are_exact_and_kept_ones_use_the_bound():
    target, draft = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.6, 0.3]])
    for rule, alpha in (("chow", 0.39), ("opt", 0.1), ("token", 0.5)):
        served = target.clone()
        CascadeSampler(rule, alpha, 0.3).bend(served, draft)
        torch.testing.assert_close(served, target if rule != "token" else torch.tensor([[0.73, 0.18, 0.09]]))
    for rule, alpha in (("chow", 0.41), ("opt", 0.2)):  # 0.6 >= 0.7 - 0.2 * 0.6
        served = target.clone()
        CascadeSampler(rule, alpha, 0.3).bend(served, draft)
        torch.testing.assert_close(served, torch.tensor([[0.4, 0.4, 0.2]]))
    served = target.clone()
    CascadeSampler("opt", 0.2, 1.0).bend(served, draft)
    torch.testing.assert_close(served, draft)


@pytest.mark.parametrize("rule", RULES)
def test_a_higher_alpha_trusts_the_draft_model_more(rule):
    target = (3 * torch.randn(400, 30)).softmax(-1)
    draft = (6 * torch.rand(400, 1) * torch.randn(400, 30)).softmax(-1)
    moved = []
    for alpha in (0.0, 0.3, 0.6, 0.9):
        served = target.clone()
        CascadeSampler(rule, alpha, 0.4).bend(served, draft)
        moved.append(float((served - target).abs().sum()) / 2)
    assert moved[0] < moved[1] < moved[2] < moved[3]


@pytest.mark.parametrize("certain", [False, True], ids=["sampled", "certain"])
def test_special_cases_are_relaxed_and_block(certain):
    pair = ToyPair(apart=1.5)
    drafts = pair.drafts(2000, 3)
    step = pair.step(drafts, torch.full((2000,), 3), certain)

    def verified(sampler):
        torch.manual_seed(7)
        return torch.stack(sampler.verify(step))

    assert torch.equal(verified(CascadeSampler("chow", 1.0, 0.2)), verified(RelaxedSampler(0.2)))
    assert not torch.equal(verified(RelaxedSampler(0.2)), verified(BlockSampler()))
    for rule in RULES:
        assert torch.equal(verified(CascadeSampler(rule, 1.0, 0.0)), verified(BlockSampler()))
    if not certain:
        # No draft is ever certain to the last bit, so that alpha = 0 defers everywhere.
        assert torch.equal(verified(CascadeSampler("chow", 0.0, 0.9)), verified(BlockSampler()))


@pytest.mark.parametrize(("rule", "share"), [("chow", 0.5), ("opt", 0.5), ("token", 0.3)])
def test_deterministic_drafts_are_kept_within_the_bound(rule, share):
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(BATCH, 1)
    step = VerificationBatch(torch.full((BATCH,), 1), [1] * BATCH, logits, None)
    kept, following = CascadeSampler(rule, 0.2, 0.2).verify(step)
    assert float(kept.float().mean()) == pytest.approx(share, abs=0.02)
    rest = following[kept == 0]
    assert set(rest.tolist()) == {0, 2}
    assert float((rest == 0).float().mean()) == pytest.approx(5 / 7, abs=0.03)


@pytest.mark.parametrize(("rule", "alpha", "num_kept"), [("opt", 0.1, [2, 1, 0]), ("token", 0.2, [1, 1, 0])])
def test_greedy_requests_keep_tokens_that_lack_little(rule, alpha, num_kept):
    probs = torch.tensor([[0.4, 0.35, 0.25], [0.4, 0.28, 0.32], [0.4, 0.35, 0.25], [0.5, 0.2, 0.3], [0.6, 0.4, 0.0]])
    drafts = torch.tensor([1, 1, 1, 1, 2])
    step = VerificationBatch(drafts, [2, 2, 1], probs.log(), None)
    kept, following = GreedyCascadeSampler(rule, alpha, 0.15).verify_greedy(step)
    assert kept.tolist() == num_kept
    assert following.tolist()[1:] == [0, 0]
    assert GreedyCascadeSampler(rule, 1.0, 1.0).verify_greedy(step)[0].tolist() == [2, 2, 0]
