"""The expert selection of a step, in loops and on tensors, against the reference in NumPy."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant.interfaces.experts import ExpertLayer, RouterStep, RowKind
from vllm_instant.moe.router_scoring import RouterScoring
from vllm_instant.tools.moe import budgets
from vllm_instant_plugins.super_expert.expert_selection import ExpertSelector

CPU = torch.device("cpu")


def _step(logits, top_k, kinds):
    scoring = RouterScoring("softmax", top_k)
    weights = scoring.weights(logits)
    ranking = scoring.ranking(weights)
    picks, picked = scoring.pick(weights, ranking)
    return RouterStep(weights, ranking, picks, picked, kinds)


def _case(tokens, experts, seed):
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.normal(0, 2, (tokens, experts)).astype(np.float32))
    kinds = torch.from_numpy(generator.choice([RowKind.PADDING, RowKind.DECODE], tokens, p=[0.3, 0.7]).astype(np.int8))
    return generator, logits, kinds


@settings(deadline=None)
@given(
    st.integers(1, 20),
    st.sampled_from([(8, 2), (16, 4), (64, 8)]),
    st.integers(0, 9),
    st.floats(0.05, 1.0),
    st.sampled_from([0.0, 0.5, 3.0]),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_both_implementations_match_the_reference(tokens, shape, keep, share, cohesion, with_prior, seed):
    experts, top_k = shape
    generator, logits, kinds = _case(tokens, experts, seed)
    prior = generator.uniform(0.2, 3.0, experts) if with_prior else None
    cluster = generator.integers(0, 4, experts)
    layer = ExpertLayer(0, "layer", experts, top_k)
    selector = ExpertSelector(layer, keep, None if prior is None else prior.tolist(), cluster.tolist(), cohesion, CPU)
    budget = math.ceil(share * experts)
    selector.budget.fill_(budget)
    step = _step(logits, top_k, kinds)
    answers = [selector.allowed(step)[0].numpy(), selector.allowed_by_tensors(step)[0].numpy()]
    expected = budgets.select_experts(
        logits.numpy(),
        top_k,
        min(keep, top_k),
        budget,
        prior,
        kinds.numpy() == RowKind.PADDING,
        cluster=cluster,
        cohesion=cohesion,
    )
    for found in answers:
        if not np.array_equal(found, expected.experts):
            # Experts with equal demand, or none, may be ranked in any order.
            differing = expected.demand[found != expected.experts]
            assert np.ptp(differing) <= 1e-5 * max(1.0, differing.max())
        assert found.sum() == expected.experts.sum()


@given(st.integers(2, 16), st.integers(0, 10_000))
def test_experts_of_prompt_tokens_are_always_allowed(tokens, seed):
    _, logits, _ = _case(tokens, 16, seed)
    kinds = torch.full((tokens,), RowKind.DECODE, dtype=torch.int8)
    kinds[0] = RowKind.PREFILL
    selector = ExpertSelector(ExpertLayer(0, "layer", 16, 4), 1, None, None, 0.0, CPU)
    selector.budget.fill_(4)
    step = _step(logits, 4, kinds)
    for allowed in (selector.allowed(step)[0], selector.allowed_by_tensors(step)[0]):
        assert allowed[step.picks[0]].all()
        assert allowed[step.picks[:, 0]].all()


@given(st.integers(0, 10_000))
def test_one_token_alone_keeps_its_picks(seed):
    _, logits, _ = _case(1, 64, seed)
    selector = ExpertSelector(ExpertLayer(0, "layer", 64, 8), 1, None, None, 0.0, CPU)
    selector.budget.fill_(8)
    step = _step(logits, 8, torch.full((1,), RowKind.DECODE, dtype=torch.int8))
    assert selector.allowed(step)[0][step.picks[0]].all()
