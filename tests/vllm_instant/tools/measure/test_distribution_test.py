"""The permutation test: how often it raises a false alarm, and what it finds."""

import numpy as np
import pytest
import torch
from planted_samplers import PLANTED
from toy_models import ToyPair

from vllm_instant.tools.measure.distribution_test import compare_draws, detectable, effective_draws
from vllm_instant_plugins.samplers.block import BlockSampler
from vllm_instant_plugins.samplers.relaxed import RelaxedSampler
from vllm_instant_plugins.samplers.token import TokenSampler

DRAWS, PROMPTS = 600, 4
LIMIT = 1e-3


def _independent(seed, chances, draws=DRAWS, prompts=PROMPTS):
    generator = np.random.default_rng(seed)
    return [generator.choice(len(chances), (draws, 3), p=chances) for _ in range(prompts)]


def _sampled(sampler, seed):
    """Three tokens of toy models, one pair per "prompt", with two drafts per request as `verify` asks for them."""
    torch.manual_seed(seed)
    arms = []
    for prompt in range(PROMPTS):
        pair = ToyPair(vocabulary=5, seed=prompt)
        drafts = pair.drafts(DRAWS, 2)
        lengths = torch.full((DRAWS,), 2)
        kept, following = (
            (torch.zeros(DRAWS, dtype=torch.int64), torch.zeros(DRAWS, dtype=torch.int64))
            if sampler is None
            else sampler.verify(pair.step(drafts, lengths))
        )
        if sampler is None:
            lengths = torch.zeros(DRAWS, dtype=torch.int64)
        arms.append(pair.continued(drafts, lengths, kept, following).numpy())
    return arms


def test_twenty_servers_without_a_fault_pass():
    for seed in range(20):
        sampler = (TokenSampler(), BlockSampler(), RelaxedSampler(0.0))[seed % 3]
        found = compare_draws(_sampled(sampler, 100 + seed), _sampled(None, 200 + seed), false_alarms=LIMIT, seed=seed)
        assert found.p_value >= LIMIT


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(name):
    for seed in range(2):
        found = compare_draws(_sampled(PLANTED[name](), seed), _sampled(None, 50 + seed), false_alarms=LIMIT)
        assert found.p_value < LIMIT
        assert found.distance > 0.05


def test_a_lossy_sampler_is_found_and_its_distance_estimated():
    found = compare_draws(_sampled(RelaxedSampler(0.3), 1), _sampled(None, 2), false_alarms=LIMIT)
    assert found.p_value < LIMIT
    assert 0.05 < found.distance < 0.9


def test_p_values_are_what_they_say():
    """Uniform without a difference, also with long tails of rare outcomes."""
    chances = np.random.default_rng(0).dirichlet(np.full(300, 0.2))
    values = np.array(
        [compare_draws(_independent(s, chances), _independent(999 + s, chances), seed=s).p_value for s in range(40)]
    )
    for share in (0.1, 0.3, 0.5, 0.8):
        assert abs((values <= share).mean() - share) < 4 * np.sqrt(share * (1 - share) / 40)


def test_the_stated_power_is_reached():
    """Half of the probability rises by what is said to be detectable, the hardest way to differ."""
    even = np.full(20, 1 / 20)
    size = detectable(effective_draws(_independent(0, even), _independent(1, even)), 19 * PROMPTS, LIMIT)
    tilted = even + np.where(np.arange(20) % 2 == 0, size, -size) / 10
    assert abs(tilted - even).sum() / 2 == pytest.approx(size)
    found = sum(
        compare_draws(_independent(s, tilted), _independent(500 + s, even), false_alarms=LIMIT).p_value < LIMIT
        for s in range(6)
    )
    assert found >= 4


def test_the_arms_may_differ_in_size():
    even = np.full(6, 1 / 6)
    found = compare_draws(_independent(1, even, draws=900), _independent(2, even, draws=300))
    assert found.p_value > LIMIT
    assert found.draws == 900 * PROMPTS


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([], [], "both arms need draws"),
        ([np.zeros((3, 2), int)], [np.zeros((0, 2), int)], "both arms need draws"),
        ([np.zeros((3, 2), int)], [np.zeros((3, 4), int)], "the same number of tokens"),
    ],
)
def test_bad_input(ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        compare_draws(ours, theirs)


def test_one_outcome_is_no_difference():
    same = [np.ones((40, 3), int)]
    found = compare_draws(same, same)
    assert found.p_value > 0.9
    assert found.distance == 0
