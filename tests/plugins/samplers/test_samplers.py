"""The rejection samplers against toy models whose distributions are known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted_samplers import PLANTED
from toy_models import ToyPair

from vllm_instant import VerificationBatch
from vllm_instant.speculation.verification import pad_drafts
from vllm_instant_plugins.samplers import block, residuals
from vllm_instant_plugins.samplers.block import BlockSampler
from vllm_instant_plugins.samplers.draws import draw
from vllm_instant_plugins.samplers.relaxed import RelaxedSampler
from vllm_instant_plugins.samplers.token import TokenSampler, ratios

BATCH = 25_000
LOSSLESS = {"token": TokenSampler(), "block": BlockSampler(), "relaxed 0": RelaxedSampler(0.0)}


def _stopping(pair, drafts, rule):
    """How long each draft is: fixed, different by request, or until a token that the draft model itself chose."""
    if rule == "fixed":
        return torch.full((len(drafts),), drafts.shape[1])
    if rule == "by request":
        return torch.arange(len(drafts)) % (drafts.shape[1] + 1)
    # A draft ends behind its first token 0: a decision by the tokens before the end, not by those cut off.
    ended = (drafts == 0).long().cumsum(1) - (drafts == 0).long()
    return (ended == 0).sum(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("rule", ["fixed", "by request", "until"])
@pytest.mark.parametrize("certain", [False, True], ids=["sampled", "certain"])
def test_the_joint_distribution_is_the_targets(name, rule, certain):
    pair = ToyPair()
    drafts = pair.drafts(BATCH, 3)
    lengths = _stopping(pair, drafts, rule)
    kept, following = LOSSLESS[name].verify(pair.step(drafts, lengths, certain))
    said = pair.continued(drafts, lengths, kept, following)
    assert pair.distance(said) < 1.6 * pair.noise(BATCH)
    assert float(kept.float().mean()) > 0.3


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_seen_by_the_same_measure(name):
    pair = ToyPair()
    drafts = pair.drafts(BATCH, 3)
    lengths = _stopping(pair, drafts, "fixed")
    kept, following = PLANTED[name]().verify(pair.step(drafts, lengths))
    assert pair.distance(pair.continued(drafts, lengths, kept, following)) > 5 * pair.noise(BATCH)


def test_block_accepts_more_than_token_on_average():
    for apart in (0.3, 0.9, 2.0):
        pair = ToyPair(apart=apart, vocabulary=6)
        drafts = pair.drafts(BATCH, 6)
        step = pair.step(drafts, torch.full((BATCH,), 6))
        means = [float(sampler.verify(step)[0].float().mean()) for sampler in (TokenSampler(), BlockSampler())]
        assert means[1] > means[0] * 1.005


def test_the_weights_are_those_of_the_recursion():
    of_drafts = torch.rand(500, 9, dtype=torch.float64) * 2.5
    of_drafts[::7, 4] = 0.0
    expected = []
    weight = torch.ones(500, dtype=torch.float64)
    for position in range(9):
        weight = (weight * of_drafts[:, position]).clamp(max=1)
        expected.append(weight)
    torch.testing.assert_close(block.weights(of_drafts), torch.stack(expected, 1))


def _distance_of_first_token(sampler, pair, certain=False, draft=None):
    drafts = pair.drafts(BATCH, 3) if draft is None else draft
    lengths = torch.full((BATCH,), 3)
    kept, following = sampler.verify(pair.step(drafts, lengths, certain))
    first = pair.continued(drafts, lengths, kept, following)[:, 0]
    counted = torch.bincount(first, minlength=pair.vocabulary) / BATCH
    return float((counted - pair.target[-1]).abs().sum() / 2), float(kept.float().mean())


@pytest.mark.parametrize("certain", [False, True], ids=["sampled", "certain"])
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.3])
def test_relaxed_stays_within_its_budget_and_uses_it(epsilon, certain):
    pair = ToyPair(apart=2.5)
    exact, kept_exactly = _distance_of_first_token(BlockSampler(), pair, certain)
    bent, kept = _distance_of_first_token(RelaxedSampler(epsilon), pair, certain)
    assert exact < 0.01
    assert bent < epsilon + 0.01
    assert kept > kept_exactly
    if not certain:  # far apart, so that the whole budget is used
        assert bent > 0.5 * epsilon


def test_relaxed_moves_no_probability_to_forbidden_tokens():
    target, draft = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.1, 0.9]])
    residuals.move_towards(target, draft, 0.4)
    torch.testing.assert_close(target, torch.tensor([[0.5, 0.5, 0.0]]))
    logits = torch.tensor([[0.0, 0.0, -torch.inf]]).repeat(4000, 1)
    step = VerificationBatch(torch.full((4000,), 2), [1] * 4000, logits, draft.repeat(4000, 1))
    kept, following = RelaxedSampler(1.0).verify(step)
    assert kept.sum() == 0
    assert set(following.tolist()) <= {0, 1}


@given(st.integers(1, 5), st.integers(2, 9000), st.floats(0, 1), st.integers(0, 10_000))
def test_compiled_passes_are_the_tensor_formulas(rows, vocabulary, epsilon, seed):
    generator = torch.Generator().manual_seed(seed)
    target = (2 * torch.randn(rows, vocabulary, generator=generator)).softmax(-1)
    target[:, ::3] *= (torch.rand(rows, 1, generator=generator) < 0.5).float()
    target /= target.sum(1, keepdim=True).clamp_min(1e-9)
    draft = (2 * torch.randn(rows, vocabulary, generator=generator)).softmax(-1)
    weight = torch.rand(rows, generator=generator)
    weight[0] = 0
    expected = (target.double() * weight[:, None].double() - draft.double()).clamp_min(0).sum(1)
    expected[0] = 0
    torch.testing.assert_close(
        residuals.residual_masses(target, draft, weight).double(), expected, atol=2e-6, rtol=1e-4
    )

    moved = target.clone()
    residuals.move_towards(moved, draft, epsilon)
    assert float((moved - target).abs().sum(1).max()) / 2 <= epsilon + 1e-5
    torch.testing.assert_close(moved.sum(1), target.sum(1), atol=1e-4, rtol=1e-4)
    kept_before, kept_after = (torch.minimum(p, draft).sum(1) for p in (target, moved))
    allowed = torch.where(target > 0, (draft - target).clamp_min(0), 0).sum(1)
    gained = torch.minimum(allowed, (target - draft).clamp_min(0).sum(1)).clamp(max=epsilon)
    torch.testing.assert_close(kept_after - kept_before, gained, atol=1e-4, rtol=1e-3)
    assert not (moved[target == 0] > 0).any()


def test_padding_is_rejected_and_the_next_token_comes_from_the_target():
    pair = ToyPair()
    drafts = pair.drafts(BATCH, 3)
    drafts[:, 1:] = -1
    step = VerificationBatch(
        drafts.flatten(),
        [3] * BATCH,
        pair.target[torch.cat([torch.full((BATCH, 1), 4), drafts[:, :1], drafts[:, :1]], 1).flatten()].log(),
        pair.draft[torch.full((3 * BATCH,), 4)],
    )
    for sampler in LOSSLESS.values():
        kept, following = sampler.verify(step)
        assert int(kept.max()) == 1
        said = pair.continued(drafts, torch.full((BATCH,), 3), kept, following)
        assert pair.distance(said) < 1.6 * pair.noise(BATCH)


@pytest.mark.parametrize("sampler", LOSSLESS.values(), ids=LOSSLESS)
def test_equal_models_keep_everything_and_impossible_drafts_nothing(sampler):
    probs = torch.rand(8, 50).softmax(-1)
    drafts = torch.multinomial(probs, 1)[:, 0]
    kept, _ = sampler.verify(VerificationBatch(drafts, [4, 4], probs.log(), probs))
    assert kept.tolist() == [4, 4]
    logits = probs.log()
    logits[0, drafts[0]] = -torch.inf
    kept, following = sampler.verify(VerificationBatch(drafts, [4, 4], logits, probs))
    assert kept.tolist() == [0, 4]
    assert following[0] != drafts[0]


def test_tokens_that_a_draft_model_cannot_have_sampled_are_rejected():
    probs = torch.tensor([[0.5, 0.5, 0.0]])
    step = VerificationBatch(torch.tensor([2]), [1], torch.zeros(1, 3), probs)
    assert float(ratios(pad_drafts(step.draft_token_ids, [1]), torch.full((1, 3), 1 / 3), probs)[0, 0]) == 0
    assert all(int(sampler.verify(step)[0][0]) == 0 for sampler in LOSSLESS.values())


def test_requests_without_drafts_among_others():
    pair = ToyPair()
    drafts = pair.drafts(5, 2)
    for sampler in LOSSLESS.values():
        kept, following = sampler.verify(pair.step(drafts, torch.tensor([0, 2, 0, 1, 0])))
        assert kept.shape == following.shape == (5,)
        assert kept[[0, 2, 4]].sum() == 0


def test_drawing_follows_the_weights_and_skips_entries_without_weight():
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]).repeat(40_000, 1)
    drawn = draw(weights)
    assert set(drawn.tolist()) == {1, 3}
    assert float((drawn == 3).float().mean()) == pytest.approx(0.75, abs=0.01)
    wide = torch.zeros(200, 150_000)
    wide[:, -1] = 1e-30
    assert set(draw(wide).tolist()) == {149_999}


def test_a_random_number_of_zero_keeps_no_impossible_draft(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    probs = torch.tensor([[0.5, 0.5]])
    logits = torch.tensor([[0.0, -torch.inf]])
    for sampler in LOSSLESS.values():
        assert sampler.verify(VerificationBatch(torch.tensor([1]), [1], logits, probs))[0].tolist() == [0]
