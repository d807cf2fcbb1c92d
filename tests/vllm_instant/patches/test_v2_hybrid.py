"""A drafter plugin beside a draft model on the V2 runner, without an engine."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches import v2_drafter, v2_hybrid
from vllm_instant.patches.plugin_factory import PluginStartError
from vllm_instant.patches.v2_drafter import OWN_ATTRIBUTE, PluginSpeculator, own_drafts
from vllm_instant.patches.v2_hybrid import mixed
from vllm_instant_plugins.hybrid.device_drafter import LookupHybridDeviceDrafter

REQUESTS, DRAFTS, VOCABULARY = 3, 2, 12
HYBRID = ("drafter.plugin=hybrid", "drafter.model=org/draft")


class Plugin:
    """Drafts fives for the second request."""

    def propose_on_device(self, batch):
        return torch.full((REQUESTS, DRAFTS), 5)

    def prefers_own(self, batch):
        return torch.tensor([False, True, False])

    def forget_on_device(self, request):
        pass


def _speculator(plugin, logits=None):
    state = SimpleNamespace(
        max_num_reqs=4,
        max_model_len=64,
        all_token_ids=SimpleNamespace(gpu=torch.zeros(4, 64, dtype=torch.int32)),
        total_len=SimpleNamespace(gpu=torch.full((4,), 9, dtype=torch.int32)),
    )
    own = PluginSpeculator(GuardedPlugin("drafter", "test", plugin), state, DRAFTS, VOCABULARY, "cpu")
    return SimpleNamespace(draft_logits=logits, **{OWN_ATTRIBUTE: own})


def _propose(speculator, planned=DRAFTS, **options):
    batch = SimpleNamespace(
        num_reqs=REQUESTS,
        req_ids=["a", "b", "c"],
        idx_mapping=torch.tensor([2, 0, 3]),
        num_computed_tokens_np=np.array([8, 8, 8]),
        num_scheduled_tokens=np.array([1, 1, 1]),
    )
    num_sampled, num_rejected = torch.ones(2, REQUESTS, dtype=torch.int32)
    model = torch.full((REQUESTS, DRAFTS), 7)
    return v2_hybrid._propose(
        lambda *_, **__: model,
        speculator,
        batch,
        *[None] * 4,
        num_sampled,
        num_rejected,
        num_speculative_tokens=planned,
        **options,
    )


def test_each_request_has_the_drafts_of_the_source_that_the_plugin_prefers():
    assert _propose(_speculator(Plugin())).tolist() == [[7, 7], [5, 5], [7, 7]]


@pytest.mark.parametrize("options", [{"planned": 0}, {"dummy_run": True}])
def test_where_nothing_is_drafted_the_plugin_is_not_asked(options):
    assert _propose(_speculator(None), **options).tolist() == [[7, 7]] * REQUESTS


def test_a_draft_model_alone_is_left_alone():
    assert _propose(SimpleNamespace(draft_logits=None)).tolist() == [[7, 7]] * REQUESTS


@pytest.mark.parametrize("method", ["propose_on_device", "prefers_own"])
@pytest.mark.parametrize("answer", [RuntimeError, lambda: None, lambda: torch.zeros(1), lambda: torch.ones(REQUESTS)])
def test_after_a_failure_the_models_drafts_are_used(method, answer):
    def fail(batch):
        if answer is RuntimeError:
            raise RuntimeError
        return answer()

    plugin = Plugin()
    setattr(plugin, method, fail)
    speculator = _speculator(plugin)
    for _ in range(2):
        assert _propose(speculator).tolist() == [[7, 7]] * REQUESTS
    assert getattr(speculator, OWN_ATTRIBUTE).drafter.disabled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_drafts_of_the_plugin_are_certain_for_the_sampler_and_others_keep_their_distribution(dtype):
    logits = torch.randn(4, DRAFTS, VOCABULARY).mul(20).to(dtype)
    before = logits.clone()
    _propose(_speculator(Plugin(), logits))
    for temperature in (0.1, 1.0, 50.0):
        distribution = (logits[0].float() / temperature).softmax(-1)
        assert distribution[:, 5].tolist() == [1.0, 1.0]
        assert distribution.sum(-1).tolist() == [1.0, 1.0]
    assert torch.equal(logits[1:], before[1:])


def test_a_smaller_vocabulary_of_the_draft_model_is_respected():
    logits = torch.zeros(1, DRAFTS, 6)
    own, chosen, rows = torch.full((1, DRAFTS), 11), torch.tensor([True]), torch.tensor([0])
    drafts = mixed(torch.zeros(1, DRAFTS, dtype=torch.int64), own, chosen, logits, rows)
    assert drafts.tolist() == [[5, 5]]
    assert logits.argmax(-1).tolist() == [[5, 5]]


def _deploy(monkeypatch, *overrides):
    monkeypatch.setenv(deployment_env.VARIABLE, "")
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "")
    deployment_env.set_deployment(resolve(None, overrides))


@pytest.mark.parametrize(("overrides", "expected"), [(HYBRID, True), (("drafter.plugin=suffix",), None)])
def test_tokens_are_kept_on_the_device_beside_a_draft_model(monkeypatch, overrides, expected):
    _deploy(monkeypatch, *overrides)
    found = {}
    v2_hybrid._init_request_state(found.update, None)
    assert found.get("use_dense_all_token_ids") is expected


def test_the_runner_gets_the_draft_model_with_the_plugin_beside_it(monkeypatch):
    _deploy(monkeypatch, *HYBRID)
    config = SimpleNamespace(speculative_config=SimpleNamespace(method="draft_model", model="org/draft"))
    state = SimpleNamespace(max_num_reqs=2)
    model = SimpleNamespace()
    lookup = LookupHybridDeviceDrafter(SimpleNamespace(), None, "cpu", DRAFTS)
    monkeypatch.setattr(
        v2_drafter, "context_of", lambda *_: SimpleNamespace(num_speculative_tokens=DRAFTS, vocab_size=VOCABULARY)
    )
    monkeypatch.setattr(v2_drafter, "build_guarded", lambda *_, **__: GuardedPlugin("drafter", "hybrid", lookup))
    assert v2_drafter._init_speculator(lambda *_: model, config, "cpu", state) is model
    assert own_drafts(model).drafter.instance is lookup
    monkeypatch.setattr(v2_drafter, "build_guarded", lambda *_, **__: GuardedPlugin("drafter", "hybrid", object()))
    with pytest.raises(PluginStartError, match="HybridDeviceDrafter"):
        v2_drafter._init_speculator(lambda *_: model, config, "cpu", state)


def test_the_lookups_expectation_and_what_became_of_the_last_drafts_decide():
    asked, forgotten = [], []
    source = SimpleNamespace(prefers_lookup=lambda *given: asked.append(given), forget=forgotten.append)
    lookup = SimpleNamespace(expected=object(), forget=lambda row: None)
    drafter = LookupHybridDeviceDrafter(lookup, None, "cpu", source)
    batch = SimpleNamespace(rows=object(), num_sampled=object(), num_rejected=object())
    drafter.prefers_own(batch)
    assert asked == [(batch.rows, batch.num_sampled, batch.num_rejected, lookup.expected)]
    drafter.forget_on_device(SimpleNamespace(request_id="a", row=3))
    assert forgotten == [3]
