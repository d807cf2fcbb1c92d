"""The selection of experts, and its restriction to allowed experts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant.moe.router_scoring import FUNCTIONS, RouterScoring, one_hot, reroute_restricted
from vllm_instant.tools.moe import budgets

SHAPES = st.tuples(st.integers(1, 12), st.sampled_from([(8, 2), (16, 4), (64, 8)]), st.integers(0, 10_000))


def _logits(tokens, experts, seed):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


def _scoring(function, top_k, experts, seed, biased, grouped, renormalize=True):
    bias = torch.rand(experts, generator=torch.Generator().manual_seed(seed + 1)) if biased else None
    return RouterScoring(function, top_k, bias, 4 if grouped else 1, 2 if grouped else 1, renormalize)


@given(SHAPES)
def test_softmax_scoring_equals_the_plain_formula(shape):
    tokens, (experts, top_k), seed = shape
    logits = _logits(tokens, experts, seed)
    scoring = RouterScoring("softmax", top_k)
    weights = scoring.weights(logits)
    picks, picked = scoring.pick(weights, scoring.ranking(weights))
    expected, expected_weights = budgets.route(logits.numpy(), top_k, np.ones(experts, bool))
    assert np.array_equal(picks.numpy(), expected)
    np.testing.assert_allclose(picked.numpy(), expected_weights, rtol=1e-4, atol=1e-6)


@settings(deadline=None)
@given(SHAPES, st.sampled_from(FUNCTIONS), st.booleans(), st.booleans(), st.booleans(), st.floats(0, 1))
def test_restricted_tokens_select_only_allowed_experts(shape, function, biased, grouped, renormalize, share):
    tokens, (experts, top_k), seed = shape
    scoring = _scoring(function, top_k, experts, seed, biased, grouped, renormalize)
    weights = scoring.weights(_logits(tokens, experts, seed))
    picks, _ = scoring.pick(weights, scoring.ranking(weights))
    generator = torch.Generator().manual_seed(seed + 2)
    allowed = torch.rand(1, experts, generator=generator) < share
    held = torch.rand(tokens, generator=generator) < 0.7
    changed, chosen, chosen_weights = reroute_restricted(scoring, weights, picks, allowed, held)
    enough = int(allowed.sum()) >= top_k
    inside = allowed.expand_as(weights).gather(1, picks).all(-1)
    assert torch.equal(changed, held & ~inside & enough)
    if changed.any():
        assert allowed.expand_as(weights).gather(1, chosen)[changed].all()
        assert (one_hot(chosen, experts).sum(-1) == top_k).all()
        own = weights.gather(1, chosen)[changed]
        if renormalize:
            torch.testing.assert_close(chosen_weights[changed].sum(-1), torch.ones(int(changed.sum())))
            own = own / own.sum(-1, keepdim=True)
        # Kept experts weigh what the model says, relative to each other: no bias in the weights.
        torch.testing.assert_close(chosen_weights[changed], own)


def test_a_large_bias_does_not_select_a_forbidden_expert():
    """A logit of -inf alone would leave a sigmoid of 0 plus the bias, which can still be the best."""
    bias = torch.zeros(8)
    bias[3] = 5.0
    scoring = RouterScoring("sigmoid", 2, bias)
    weights = scoring.weights(torch.zeros(1, 8))
    picks, _ = scoring.pick(weights, scoring.ranking(weights))
    assert 3 in picks
    allowed = torch.ones(1, 8, dtype=torch.bool)
    allowed[0, 3] = False
    changed, chosen, picked = reroute_restricted(scoring, weights, picks, allowed, torch.tensor([True]))
    assert changed.all()
    assert 3 not in chosen
    torch.testing.assert_close(picked, torch.full((1, 2), 0.5))


def test_groups_are_scored_by_their_allowed_experts():
    scoring = RouterScoring("softmax", 2, groups=4, top_groups=1)
    weights = scoring.weights(torch.tensor([[9.0, 8.0, 5.0, 4.0, 1.0, 0.0, 0.0, 0.0]]))
    allowed = torch.tensor([[False, True, True, True, True, True, True, True]])
    _, chosen, _ = reroute_restricted(scoring, weights, torch.tensor([[0, 1]]), allowed, torch.tensor([True]))
    # The first group has one allowed expert left, too few for two picks: groups no longer bind this token.
    assert chosen.tolist() == [[1, 2]]


@pytest.mark.parametrize("renormalize", [True, False])
def test_without_renormalization_kept_experts_keep_their_weights(renormalize):
    scoring = RouterScoring("softmax", 2, renormalize=renormalize)
    weights = scoring.weights(torch.tensor([[2.0, 1.0, 0.0, -1.0]]))
    picks, before = scoring.pick(weights, scoring.ranking(weights))
    allowed = torch.tensor([[True, False, True, True]])
    _, chosen, after = reroute_restricted(scoring, weights, picks, allowed, torch.tensor([True]))
    assert chosen.tolist() == [[0, 2]]
    assert (after[0, 0] == before[0, 0]) == (not renormalize)
