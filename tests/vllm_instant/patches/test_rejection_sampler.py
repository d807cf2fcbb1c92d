"""The patch around rejection samplers, with vLLM's own sampler classes and made-up logits."""

from types import SimpleNamespace

import pytest
import torch
from patch_harness import wrap
from planted_samplers import OutOfRange, Raising
from sampler_harness import drafts_metadata, our_sampler, prepare_cpu_kernels, sampling_metadata, stock_sampler

from vllm_instant.deployment.settings import resolve
from vllm_instant.patches import rejection_sampler as patch
from vllm_instant.patches.names import V2_REJECTION_SAMPLER
from vllm_instant_plugins.samplers.block import BlockSampler
from vllm_instant_plugins.samplers.cascade import CascadeSampler, GreedyCascadeSampler
from vllm_instant_plugins.samplers.token import TokenSampler

pytestmark = pytest.mark.engine
VOCABULARY = 40


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    prepare_cpu_kernels()


@pytest.fixture
def drafts():
    """Ragged, one request without any, some padding."""
    generator = torch.Generator().manual_seed(5)
    lengths = (4, 0, 2, 4, 3)
    rows = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    rows[3][2:] = [-1, -1]
    return rows


def _logits(drafts, favour=0.0):
    """``[total + batch, VOCABULARY]``; drafts are liked ``favour`` more than other tokens."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(sum(len(row) + 1 for row in drafts), VOCABULARY, generator=generator)
    row = 0
    for tokens in drafts:
        for token in tokens:
            if token >= 0:
                logits[row, token] += favour
            row += 1
        row += 1
    return logits


def _said(output):
    return [[token for token in row if token >= 0] for row in output.sampled_token_ids.tolist()]


@pytest.mark.parametrize("favour", [0.0, 3.0, 9.0])
def test_greedy_requests_get_what_vllm_gives_them(drafts, favour):
    metadata, logits = drafts_metadata(drafts), _logits(drafts, favour)
    expected = _said(stock_sampler()(metadata, None, logits, sampling_metadata([0.0] * 5)))
    assert _said(our_sampler(TokenSampler())(metadata, None, logits, sampling_metadata([0.0] * 5))) == expected
    mixed = sampling_metadata([0.0, 0.0, 1.0, 0.0, 0.0])
    for plugin in (TokenSampler(), BlockSampler()):
        said = _said(our_sampler(plugin)(metadata, None, logits, mixed))
        assert [said[i] for i in (0, 1, 3, 4)] == [expected[i] for i in (0, 1, 3, 4)]


@pytest.mark.parametrize("temperatures", [[0.0] * 5, [0.0, 0.0, 1.0, 0.0, 0.0]], ids=["all", "mixed"])
def test_greedy_requests_are_the_plugins_where_the_user_says_so(drafts, temperatures):
    metadata, logits, sampling = drafts_metadata(drafts), _logits(drafts), sampling_metadata(temperatures)
    exact = _said(our_sampler(CascadeSampler("opt", 0.1, 1.0))(metadata, None, logits, sampling))
    loose = _said(our_sampler(GreedyCascadeSampler("opt", 0.1, 1.0))(metadata, None, logits, sampling))
    for request in (0, 1, 3, 4):
        real = [token for token in drafts[request] if token >= 0]
        assert loose[request][: len(real)] == real
        assert len(exact[request]) == 1


def test_a_plugin_that_fails_at_greedy_requests_is_disabled(drafts):
    class Failing(GreedyCascadeSampler):
        def verify_greedy(self, step):
            return torch.zeros(1), torch.zeros(1)

    sampler = our_sampler(Failing("opt", 0.1, 1.0))
    metadata, logits = drafts_metadata(drafts), _logits(drafts)
    expected = _said(stock_sampler()(metadata, None, logits, sampling_metadata([0.0] * 5)))
    assert _said(sampler(metadata, None, logits, sampling_metadata([0.0] * 5))) == expected
    assert sampler.instant_plugin.disabled


def test_seeds_are_ignored_where_the_user_says_so():
    logits = _logits([[0, 1, 2, 3], [1]], 60.0)
    for keeps_seeds in (True, False):
        generator = torch.Generator().manual_seed(11)
        before = generator.get_state()
        sampling = sampling_metadata([1.0, 1.0], generators={0: generator})
        plugin = CascadeSampler("opt", 0.1, 0.2, keeps_seeds=keeps_seeds)
        said = _said(our_sampler(plugin)(drafts_metadata([[0, 1, 2, 3], [1]]), None, logits, sampling))
        assert said[0][:4] == [0, 1, 2, 3]
        assert torch.equal(generator.get_state(), before) is not keeps_seeds


def _without_speculation(logits, seed, length):
    """What vLLM's sampler says with a seed, one row after the other."""
    generator = torch.Generator().manual_seed(seed)
    sampler = stock_sampler().sampler
    said = []
    for row in range(length):
        sampling = sampling_metadata([1.0], generators={0: generator})
        said.append(
            int(sampler(logits=logits[row : row + 1].clone(), sampling_metadata=sampling).sampled_token_ids[0, 0])
        )
    return said, generator


@pytest.mark.parametrize("right", range(5))
def test_a_seed_says_what_it_says_without_drafts(right):
    """The first ``right`` of four drafts are what the seed will say. The generator ends where it would, too."""
    logits = _logits([[0, 0, 0, 0], [1]])
    expected, _ = _without_speculation(logits, 11, 5)
    tokens = [t if i < right else (t + 1) % VOCABULARY for i, t in enumerate(expected[:4])]
    generator = torch.Generator().manual_seed(11)
    sampling = sampling_metadata([1.0, 1.0], generators={0: generator})
    output = our_sampler(BlockSampler())(drafts_metadata([tokens, [1]]), None, logits, sampling)
    assert _said(output)[0] == expected[: right + 1]
    _, elsewhere = _without_speculation(logits, 11, right + 1)
    assert torch.equal(generator.get_state(), elsewhere.get_state())


def test_a_seeded_request_without_drafts_uses_its_seed_once():
    logits = _logits([[], [1]])
    expected, elsewhere = _without_speculation(logits, 3, 1)
    generator = torch.Generator().manual_seed(3)
    output = our_sampler(TokenSampler())(
        drafts_metadata([[], [1]]), None, logits, sampling_metadata([1.0, 1.0], generators={0: generator})
    )
    assert _said(output)[0] == expected
    assert torch.equal(generator.get_state(), elsewhere.get_state())


@pytest.mark.parametrize("plugin", [TokenSampler(), BlockSampler()], ids=["token", "block"])
@pytest.mark.parametrize("temperatures", [[1.0, 1.0], [0.0, 1.0]], ids=["sampled", "mixed"])
def test_steps_without_drafts_are_vllms_own(plugin, temperatures):
    """They reach the rejection sampler under asynchronous scheduling."""
    logits = _logits([[], []])

    def answer(sampler):
        generators = {1: torch.Generator().manual_seed(3), 0: torch.Generator().manual_seed(4)}
        sampling = sampling_metadata(temperatures, generators=generators)
        return sampler(drafts_metadata([[], []]), None, logits.clone(), sampling).sampled_token_ids

    ours = our_sampler(plugin)
    assert torch.equal(answer(ours), answer(stock_sampler()))
    assert not ours.instant_plugin.disabled


def test_drafts_that_the_target_is_sure_of_are_kept_and_others_not(drafts):
    sure = our_sampler(TokenSampler())(
        drafts_metadata(drafts), None, _logits(drafts, 60.0), sampling_metadata([1.0] * 5)
    )
    for row, tokens in zip(_said(sure), drafts, strict=True):
        real = [token for token in tokens if token >= 0]
        assert row[:-1] == real
    never = our_sampler(TokenSampler())(
        drafts_metadata(drafts), None, _logits(drafts, -60.0), sampling_metadata([1.0] * 5)
    )
    assert [len(row) for row in _said(never)] == [1] * 5


@pytest.mark.parametrize("plugin", [Raising(), OutOfRange()], ids=["raises", "violates"])
def test_a_failing_plugin_is_disabled_and_vllm_takes_over(drafts, plugin, caplog):
    sampler = our_sampler(plugin, "broken")
    metadata, logits = drafts_metadata(drafts), _logits(drafts, 3.0)
    for _ in range(7):
        said = _said(sampler(metadata, None, logits, sampling_metadata([1.0] * 5)))
        assert [1 <= len(row) <= len(tokens) + 1 for row, tokens in zip(said, drafts, strict=True)]
    assert sampler.instant_plugin.disabled
    assert sum("broken in slot rejection_sampler raised in verify" in r.getMessage() for r in caplog.records) == 1
    generator = torch.Generator().manual_seed(1)
    seeded = sampler(metadata, None, logits, sampling_metadata([1.0] * 5, generators={0: generator}))
    assert _said(seeded)[0]


@pytest.mark.parametrize("answer", [
    (torch.zeros(2), torch.zeros(2, dtype=torch.int64)),
    (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
    (torch.tensor([0, -1]), torch.tensor([0, 0])),
    (torch.tensor([0, 0]), torch.tensor([0, VOCABULARY])),
])  # fmt: skip
def test_what_a_plugin_may_not_answer(answer):
    with pytest.raises(patch.ContractError):
        patch.checked(answer, [1, 1], torch.zeros(2, VOCABULARY))


def test_log_probabilities_come_with_every_token(drafts):
    for plugin in (TokenSampler(), BlockSampler()):
        output = our_sampler(plugin)(
            drafts_metadata(drafts), None, _logits(drafts, 3.0), sampling_metadata([1.0] * 5, max_num_logprobs=2)
        )
        width = max(map(len, drafts)) + 1
        assert output.logprobs_tensors.logprobs.shape == (5 * width, 3)
        said = output.sampled_token_ids.flatten()
        real = said >= 0
        assert torch.equal(output.logprobs_tensors.logprob_token_ids[real, 0].long(), said[real].long())


def test_drafts_of_structured_output_count_as_certain():
    probs = torch.full((3, 4), 0.25)
    certain = patch.certain_rows(probs, [0, 2], torch.tensor([3, 1]))
    assert certain.tolist() == [[0, 0, 0, 1], [0.25] * 4, [0, 1, 0, 0]]
    assert probs[0].tolist() == [0.25] * 4


def test_cutting_drafts_by_value_needs_certain_drafts():
    """Why: with two tokens, one forbidden. Drafts of it are cut off, and the target's one choice must remain."""
    batch = 20_000
    target, draft = torch.tensor([0.7, 0.3, 0.0]), torch.tensor([0.2, 0.2, 0.6])
    tokens = torch.multinomial(draft, batch, replacement=True)
    cut = torch.where(tokens == 2, -1, tokens)
    torch.manual_seed(0)

    def first_token(draft_probs):
        step = patch.VerificationBatch(cut, [1] * batch, target.log().repeat(batch, 1), draft_probs)
        kept, following = TokenSampler().verify(step)
        return float((torch.where(kept == 1, cut, following) == 0).float().mean())

    assert abs(first_token(draft.repeat(batch, 1)) - 0.7) > 0.03
    certain = patch.certain_rows(draft.repeat(batch, 1), list(range(batch)), tokens)
    assert first_token(certain) == pytest.approx(0.7, abs=0.012)
    assert first_token(None) == pytest.approx(0.7, abs=0.012)


@pytest.fixture
def serving(monkeypatch):
    def serve(*overrides):
        deployment = resolve(None, list(overrides))
        monkeypatch.setattr(patch.deployment_env, "get_deployment", lambda: deployment)

    return serve


def _v2_sampler(method="standard"):
    class RejectionSampler:
        def __init__(self, sampler, spec_config, device):
            self.use_block_verification = spec_config.rejection_sample_method == "block"

    wrap(patch.PATCH, V2_REJECTION_SAMPLER, RejectionSampler=RejectionSampler)
    return RejectionSampler(None, SimpleNamespace(rejection_sample_method=method), None)


def test_block_is_vllms_own_on_the_v2_runner(serving):
    serving()
    assert _v2_sampler().use_block_verification
    assert not _v2_sampler("synthetic").use_block_verification
    serving("rejection_sampler.plugin=token")
    assert not _v2_sampler().use_block_verification
    for plugin in ("relaxed", "cascade"):
        serving(f"rejection_sampler.plugin={plugin}", "rejection_sampler.epsilon=0.1")
        with pytest.raises(patch.PluginStartError, match=f"{plugin} of slot rejection_sampler needs vLLM's V1"):
            _v2_sampler()


@pytest.mark.parametrize("seeded", ["exact", "cascade"])
def test_drafts_share_noise_only_where_seeds_are_kept(serving, monkeypatch, seeded):
    runner = SimpleNamespace(
        rejection_sampler=stock_sampler(),
        speculative_config=SimpleNamespace(rejection_sample_method="standard"),
        vllm_config=None,
    )
    shared = []
    monkeypatch.setattr(patch, "context_of", lambda *_: SimpleNamespace(device="cpu", identity={}))
    monkeypatch.setattr(patch, "share_noise", shared.append)
    serving("rejection_sampler.plugin=cascade", "rejection_sampler.epsilon=0.1", f"rejection_sampler.seeded={seeded}")
    patch._install_sampler(runner)
    assert isinstance(getattr(runner.rejection_sampler, patch.SAMPLER_ATTRIBUTE).instance, CascadeSampler)
    assert bool(shared) is (seeded == "exact")


def test_a_method_of_vllms_that_was_asked_for_stays(serving):
    runner = SimpleNamespace(
        rejection_sampler=object(), speculative_config=SimpleNamespace(rejection_sample_method="synthetic")
    )
    serving()
    before = runner.rejection_sampler
    patch._install_sampler(runner)
    assert runner.rejection_sampler is before
    serving("rejection_sampler.plugin=relaxed", "rejection_sampler.epsilon=0.1")
    with pytest.raises(patch.PluginStartError, match="rejection_sample_method = 'synthetic'"):
        patch._install_sampler(runner)
