"""When a drafter plugin drafts on the device, and what the V2 runner gets from one, without an engine."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.errors import DeploymentError
from vllm_instant.deployment.resolved import PLUGIN_DRAFTER
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches import v2_drafter
from vllm_instant.patches.draft_lengths import DEVICE_METHOD, drafts_on_device, fixed_length_reason
from vllm_instant.patches.plugin_factory import PluginStartError
from vllm_instant.patches.v2_drafter import PluginSpeculator
from vllm_instant.speculation.draft_plan import DraftPlan

HOST = {"method": "custom_class", "model": PLUGIN_DRAFTER, "num_speculative_tokens": 3}


@pytest.fixture
def deploy(monkeypatch):
    """Serve a deployment given as overrides with the V2 runner, on a machine where Triton is usable."""
    import vllm.envs
    import vllm.triton_utils

    monkeypatch.setenv(deployment_env.VARIABLE, "")
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", True)
    return lambda *overrides: deployment_env.set_deployment(resolve(None, overrides))


def _configured(config, **options):
    arguments = SimpleNamespace(
        speculative_config=config, **{"enable_dbo": False, "distributed_executor_backend": None, **options}
    )
    v2_drafter._create_speculative_config(lambda: None, arguments)
    return arguments.speculative_config


def test_a_drafter_that_can_drafts_on_the_device(deploy):
    deploy("drafter.plugin=suffix")
    chosen = _configured(HOST)
    assert chosen == {**HOST, "method": DEVICE_METHOD, "prompt_lookup_min": 1, "prompt_lookup_max": 1}
    speculative = SimpleNamespace(**chosen, parallel_drafting=False)
    assert drafts_on_device(speculative)
    parallel = SimpleNamespace(data_parallel_size=1)
    assert fixed_length_reason(SimpleNamespace(speculative_config=speculative, parallel_config=parallel)) is None


@pytest.mark.parametrize(
    "config", [None, {"method": "ngram", "num_speculative_tokens": 3}, {**HOST, "model": "other.Drafter"}]
)
def test_other_drafters_stay_as_they_are(deploy, config):
    deploy("drafter.plugin=suffix")
    assert _configured(config) == config


@pytest.mark.parametrize("options", [{"enable_dbo": True}, {"distributed_executor_backend": "external_launcher"}])
def test_options_without_a_v2_runner_keep_the_drafter_on_the_host(deploy, options):
    deploy("drafter.plugin=suffix")
    assert _configured(HOST, **options) == HOST


def test_vllms_own_choice_of_the_v2_runner_is_enough(deploy, monkeypatch):
    deploy("drafter.plugin=suffix")
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    assert _configured(HOST)["method"] == DEVICE_METHOD


@pytest.mark.parametrize(
    "chosen",
    [["rejection_sampler.plugin=relaxed", "rejection_sampler.epsilon=0.1"], ["experts.plugin=observed"]],
)
def test_a_plugin_that_needs_the_v1_runner_keeps_lookups_on_the_host(deploy, monkeypatch, chosen):
    deploy("drafter.plugin=suffix", *chosen)
    assert _configured(HOST)["method"] == DEVICE_METHOD, "the V2 runner was asked for: it says what is wrong"
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    assert _configured(HOST) == HOST


def test_without_triton_or_with_the_v1_runner_the_drafter_stays_on_the_host(deploy, monkeypatch):
    import vllm.triton_utils

    deploy("drafter.plugin=suffix")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert _configured(HOST) == HOST
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", False)
    assert _configured(HOST) == HOST


@pytest.mark.parametrize(
    ("runner", "asked", "expected"),
    [(None, None, None), ("1", None, None), ("0", None, False), ("0", True, True), (None, False, False)],
)
def test_a_lookup_beside_a_draft_model_is_synchronous_on_the_host_alone(deploy, monkeypatch, runner, asked, expected):
    """None leaves it to vLLM, which schedules ahead beside a draft model."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    if runner is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    deploy("drafter.plugin=hybrid", "drafter.model=draft")
    assert _scheduling({"method": "draft_model", "model": "draft"}, asked) is expected


def test_other_drafters_leave_the_scheduling_to_vllm(deploy, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    deploy("drafter.plugin=hybrid", "drafter.model=draft")
    assert _scheduling({"method": "ngram"}, None) is None
    assert _scheduling(None, None) is None
    deploy("drafter.plugin=model", "drafter.model=draft")
    assert _scheduling({"method": "draft_model", "model": "draft"}, None) is None


def _scheduling(config, asked):
    """``async_scheduling`` that vLLM reads after the drafter was configured."""
    arguments = SimpleNamespace(
        speculative_config=config, async_scheduling=asked, enable_dbo=False, distributed_executor_backend=None
    )
    v2_drafter._create_speculative_config(lambda: None, arguments)
    return arguments.async_scheduling


def test_a_drafter_for_the_host_alone_is_one_sentence_on_the_v2_runner(deploy, monkeypatch):
    deploy("drafter.plugin=remote", "drafter.client_drafts=true")
    with pytest.raises(DeploymentError, match="remote needs the V1 model runner: set VLLM_USE_V2_MODEL_RUNNER=0"):
        _configured(HOST)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert _configured(HOST) == HOST


def test_the_v1_runner_refuses_to_draft_with_vllms_lookup_instead():
    config = SimpleNamespace(speculative_config=SimpleNamespace(method=DEVICE_METHOD, model=PLUGIN_DRAFTER))
    with pytest.raises(PluginStartError, match="VLLM_USE_V2_MODEL_RUNNER=0 to draft on the host"):
        v2_drafter._init_v1_runner(lambda config: None, None, config)
    started = []
    v2_drafter._init_v1_runner(started.append, None, SimpleNamespace(speculative_config=None))
    assert len(started) == 1


class _Drafter:
    def __init__(self, answer):
        self.answer = answer
        self.batches, self.ended = [], []

    def propose_on_device(self, batch):
        self.batches.append(batch)
        return self.answer(len(batch.request_ids))

    def forget_on_device(self, request):
        self.ended.append(request)


def _speculator(answer=lambda requests: torch.full((requests, 3), 5)):
    buffer = SimpleNamespace(gpu=torch.zeros(4, 64, dtype=torch.int32))
    lengths = SimpleNamespace(gpu=torch.tensor([9, 9, 9, 9], dtype=torch.int32))
    state = SimpleNamespace(
        max_num_reqs=4,
        max_model_len=64,
        all_token_ids=buffer,
        total_len=lengths,
        req_id_to_index={"a": 2, "b": 0},
        prompt_len=SimpleNamespace(np=np.array([4, 4, 7, 4])),
        num_computed_tokens_np=np.array([8, 8, 10, 8]),
    )
    drafter = _Drafter(answer)
    return PluginSpeculator(GuardedPlugin("drafter", "test", drafter), state, 3, 100, "cpu"), drafter


def _propose(speculator, planned=3, **options):
    batch = SimpleNamespace(
        num_reqs=2,
        req_ids=["a", "b"],
        idx_mapping=torch.tensor([2, 0]),
        num_computed_tokens_np=np.array([10, 8]),
        num_scheduled_tokens=np.array([4, 1]),
    )
    num_sampled = torch.tensor([1, 1], dtype=torch.int32)
    return speculator.propose(
        batch, *[None] * 4, num_sampled, *[None] * 5, num_speculative_tokens=planned, mm_inputs=None, **options
    )


def test_the_drafter_sees_the_step_and_an_upper_bound_of_its_tokens():
    speculator, drafter = _speculator()
    speculator.begin_step(DraftPlan(cache_salts={"a": "tenant"}))
    assert _propose(speculator, 2).tolist() == [[5, 5, 5], [5, 5, 5]]
    [batch] = drafter.batches
    assert (batch.request_ids, batch.cache_salts, batch.num_draft_tokens) == (["a", "b"], {"a": "tenant"}, 2)
    assert (batch.rows.tolist(), batch.max_num_tokens) == ([2, 0], 15)


def test_in_a_step_without_drafts_or_a_dummy_step_it_is_not_asked():
    speculator, drafter = _speculator()
    _propose(speculator, 0)
    _propose(speculator, 3, dummy_run=True)
    assert drafter.batches == []


def test_what_is_no_token_cannot_reach_the_model():
    speculator, _ = _speculator(lambda requests: torch.tensor([[-1, 100, 7]] * requests))
    assert _propose(speculator).tolist() == [[0, 99, 7]] * 2


@pytest.mark.parametrize(
    "answer",
    [lambda requests: torch.zeros(requests, 2, dtype=torch.int64), lambda requests: torch.zeros(requests, 3)],
    ids=["shape", "dtype"],
)
def test_a_wrong_answer_disables_the_drafter(answer):
    speculator, drafter = _speculator(answer)
    assert _propose(speculator).tolist() == [[0, 0, 0]] * 2
    assert speculator.drafter.disabled
    speculator.drafts.fill_(-1)  # as vLLM does where no draft was planned
    assert _propose(speculator).tolist() == [[0, 0, 0]] * 2
    assert len(drafter.batches) == 1


def test_requests_that_ended_are_named_in_order_while_their_rows_are_in_place():
    speculator, drafter = _speculator()
    runner = SimpleNamespace(speculator=speculator)
    output = SimpleNamespace(finished_req_ids={"b", "unknown", "a"})
    rows = []
    v2_drafter._finish_requests(lambda step: rows.append(len(drafter.ended)), runner, output)
    assert rows == [2]
    assert [(request.request_id, request.row, request.num_prompt_tokens) for request in drafter.ended] == [
        ("a", 2, 7),
        ("b", 0, 4),
    ]
    assert [request.max_num_tokens for request in drafter.ended] == [18, 16]
