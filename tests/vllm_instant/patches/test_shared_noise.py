"""Drafts of seeded requests share the target's noise: vLLM's own proposer and sampler classes, made-up logits."""

from types import SimpleNamespace

import pytest
import torch
from patch_harness import wrap
from sampler_harness import drafts_metadata, our_sampler, prepare_cpu_kernels, sampling_metadata

from vllm_instant.patches import shared_noise
from vllm_instant.patches.names import PROPOSER
from vllm_instant_plugins.samplers.block import BlockSampler

pytestmark = pytest.mark.engine
VOCABULARY = 50


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    prepare_cpu_kernels()


@pytest.fixture(scope="module")
def proposer_class():
    from vllm.v1.spec_decode import llm_base_proposer

    base = llm_base_proposer.SpecDecodeBaseProposer
    # vLLM's own methods, also where another test of this process has wrapped them.
    names = ("propose", "_sample_from_logits")
    proposer = type(
        "Proposer", (base,), {name: getattr(vars(base)[name], "__wrapped__", vars(base)[name]) for name in names}
    )
    wrap(shared_noise.PATCH, PROPOSER, SpecDecodeBaseProposer=proposer)
    return proposer


@pytest.fixture
def make_proposer(proposer_class):
    def make(sampler=None):
        proposer = object.__new__(proposer_class)
        proposer._enable_probabilistic_draft_probs, proposer.use_fp64_gumbel = True, False
        runner = SimpleNamespace(drafter=proposer, rejection_sampler=sampler or our_sampler(BlockSampler()))
        shared_noise.share_noise(runner)
        return proposer

    return make


def _drafts(proposer, logits, sampling):
    """Int64 ``[batch, positions]`` from logits ``[positions, batch, vocabulary]``, in the order of ``propose``."""
    getattr(proposer, shared_noise.NOISE_ATTRIBUTE).begin_step()
    return torch.stack([proposer._sample_from_logits(step.clone(), sampling)[0] for step in logits], 1)


def _verified(drafts, logits, sampling, sampler=None):
    """How many drafts of one request are kept; logits ``[positions + 1, vocabulary]``."""
    sampler = sampler or our_sampler(BlockSampler())
    output = sampler(drafts_metadata([drafts]), None, logits.clone(), sampling).sampled_token_ids[0]
    return int((output >= 0).sum()) - 1


def _seeded(seed, **options):
    return sampling_metadata([0.8], generators={0: torch.Generator().manual_seed(seed)}, **options)


@pytest.mark.parametrize("top_p", [None, [0.7]])
def test_a_perfect_draft_model_is_always_accepted(make_proposer, top_p):
    generator = torch.Generator().manual_seed(1)
    for seed in range(30):
        logits = torch.randn(5, VOCABULARY, generator=generator)
        sampling = _seeded(seed, top_p=top_p)
        drafts = _drafts(make_proposer(), logits[:4, None], sampling)[0].tolist()
        assert _verified(drafts, logits, sampling) == 4


def test_the_generator_does_not_advance_while_drafting(make_proposer):
    sampling = _seeded(3)
    before = sampling.generators[0].get_state()
    _drafts(make_proposer(), torch.randn(4, 1, VOCABULARY), sampling)
    assert torch.equal(sampling.generators[0].get_state(), before)


def test_acceptance_reaches_the_bound_of_shared_noise(make_proposer):
    generator = torch.Generator().manual_seed(2)
    target = 1.5 * torch.randn(VOCABULARY, generator=generator)
    draft = target + 0.8 * torch.randn(VOCABULARY, generator=generator)
    p, q = (target / 0.8).softmax(0), (draft / 0.8).softmax(0)
    distance = 0.5 * float((p - q).abs().sum())
    trials, proposer, kept = 2000, make_proposer(), 0
    sampler = our_sampler(BlockSampler())
    for seed in range(trials):
        sampling = _seeded(seed)
        drafts = _drafts(proposer, draft[None, None], sampling)[0].tolist()
        kept += _verified(drafts, torch.stack([target, target]), sampling, sampler)
    # Seeds are fixed, so that this is the same in every run.
    assert kept / trials > (1 - distance) / (1 + distance) - 0.02
    assert kept / trials > 2 * float((p * q).sum()), "independent noise would agree this rarely"


def test_requests_without_a_seed_are_drafted_as_before(make_proposer, proposer_class):
    logits = torch.randn(3, 4, VOCABULARY)
    sampling = sampling_metadata([0.8, 0.8, 0.8, 0.8], generators={1: torch.Generator().manual_seed(5)})
    torch.manual_seed(9)
    plain = object.__new__(proposer_class)
    plain._enable_probabilistic_draft_probs, plain.use_fp64_gumbel = True, False
    expected = [plain._sample_from_logits(step.clone(), sampling) for step in logits]
    torch.manual_seed(9)
    drafts = [make_proposer()._sample_from_logits(logits[0].clone(), sampling)]
    assert drafts[0][0][[0, 2, 3]].tolist() == expected[0][0][[0, 2, 3]].tolist()
    assert torch.equal(drafts[0][1], expected[0][1]), "the probabilities that rejection sampling uses stay"


def test_parallel_drafting_draws_one_position_after_the_other(make_proposer):
    logits = torch.randn(2, 3, VOCABULARY)
    generators = {0: torch.Generator().manual_seed(1), 1: torch.Generator().manual_seed(2)}
    sampling = sampling_metadata([0.8, 0.8], generators=generators)
    one_by_one = _drafts(make_proposer(), logits.transpose(0, 1), sampling)
    proposer = make_proposer()
    at_once = proposer._sample_from_logits(logits.reshape(6, VOCABULARY).clone(), sampling)[0]
    assert at_once.tolist() == one_by_one.flatten().tolist()


def test_each_step_starts_from_the_generator_again(make_proposer):
    sampling, proposer = _seeded(4), make_proposer()
    logits = torch.randn(2, 1, VOCABULARY)
    first = _drafts(proposer, logits, sampling)
    assert torch.equal(_drafts(proposer, logits, sampling), first)


def test_noise_is_not_shared_once_vllm_verifies(make_proposer):
    sampler = our_sampler(BlockSampler())
    sampling, logits = _seeded(4), torch.zeros(1, 1, VOCABULARY)
    proposer = make_proposer(sampler)
    assert len({_drafts(proposer, logits, sampling)[0, 0].item() for _ in range(20)}) == 1
    for _ in range(20):
        sampler.instant_plugin.call("verify", lambda plugin: 1 / 0, None)
    assert sampler.instant_plugin.disabled
    assert len({_drafts(proposer, logits, sampling)[0, 0].item() for _ in range(20)}) > 1
