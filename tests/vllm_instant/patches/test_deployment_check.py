"""What each slot can do, by rules over a resolved configuration."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from vllm_instant.deployment.settings import resolve
from vllm_instant.patches import deployment_check
from vllm_instant.patches.deployment_check import findings_of, summary_of
from vllm_instant_plugins.hybrid import plugin as hybrid

Mode = pytest.importorskip("vllm.config.compilation").CUDAGraphMode
EVERY = [(1, 60, 4), (61, 61, 2), (62, 62, 1), (63, 64, 0)]


def _config(
    v2=True,
    asynchronous=True,
    mode="FULL_AND_PIECEWISE",
    method="draft_model",
    table=EVERY,
    device="cuda",
    moe=False,
    **parallel,
):
    speculative = SimpleNamespace(
        method=method,
        model=None,
        num_speculative_tokens=4,
        num_speculative_tokens_per_batch_size=table,
        parallel_drafting=False,
        draft_model_config=None,
        enable_adaptive_verification=False,
    )
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, "enable_dbo": False}
    return SimpleNamespace(
        speculative_config=speculative if method else None,
        use_v2_model_runner=v2,
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous, max_num_seqs=64),
        compilation_config=SimpleNamespace(cudagraph_mode=Mode[mode], max_cudagraph_capture_size=512),
        device_config=SimpleNamespace(device_type=device),
        model_config=SimpleNamespace(is_moe=moe),
        parallel_config=SimpleNamespace(**(sizes | parallel)),
    )


def _found(config, *overrides):
    deployment = resolve(None, ("drafter.plugin=native", "rejection_sampler.plugin=native", *overrides))
    return [(finding.slot, finding.verdict, finding.text) for finding in findings_of(config, deployment)]


def test_a_draft_model_with_graphs_of_every_tier_serves():
    assert _found(_config()) == []


def test_the_summary_names_what_decides():
    assert summary_of(_config(tensor_parallel_size=2)) == (
        "V2 model runner, asynchronous scheduling, CUDA graphs FULL_AND_PIECEWISE, speculative method draft_model, TP 2"
    )
    assert summary_of(_config(v2=False, asynchronous=False, mode="NONE", method=None)) == (
        "V1 model runner, synchronous scheduling, CUDA graphs NONE, no speculation"
    )


@pytest.mark.parametrize(
    ("config", "overrides", "slot", "verdict", "words"),
    [
        (_config(method="suffix"), (), "speculation", "limited", "only verification follows"),
        (_config(moe=True, data_parallel_size=2), (), "speculation", "limited", "mixture-of-experts"),
        (_config(table=None), (), "speculation", "limited", "all requests verify 4 drafts"),
        (_config(v2=False, method="custom_class"), (), "speculation", "limited", "their numbers differ"),
        (_config(pipeline_parallel_size=2, asynchronous=False), (), "speculation", "limited", "issue 52071"),
        (_config(v2=False, method="custom_class"), (), "drafter", "limited", "on the host"),
        (_config(), ("rejection_sampler.plugin=block",), "rejection_sampler", "limited", "seeded answers"),
        (
            _config(),
            ("rejection_sampler.plugin=relaxed", "rejection_sampler.epsilon=0.1"),
            "rejection_sampler",
            "refused",
            "V1 model runner",
        ),
        (_config(), ("experts.plugin=observed",), "experts", "refused", "V1 model runner"),
        (_config(data_parallel_size=2), ("experts.plugin=observed",), "experts", "refused", "data_parallel_size = 2"),
        (_config(data_parallel_size=2), ("batching.plugin=similarity",), "batching", "limited", "its own queue"),
    ],
)
def test_limits(config, overrides, slot, verdict, words):
    assert any(found[:2] == (slot, verdict) and words in found[2] for found in _found(config, *overrides))


def test_a_default_drafter_that_is_left_out_is_a_limit_and_no_speculation_is_none():
    [finding] = findings_of(_config(method=None), resolve())
    assert (finding.slot, finding.verdict) == ("drafter", "limited")
    assert findings_of(_config(method=None), resolve(None, ("speculation.plugin=off",))) == []


def test_a_hybrid_drafter_is_limited_on_the_v2_runner_and_refused_where_it_drafts_on_the_host_alone(monkeypatch):
    chosen = ("drafter.plugin=hybrid", "drafter.model=org/draft")
    deployment = resolve(None, ("rejection_sampler.plugin=native", *chosen))
    assert [(f.slot, f.verdict) for f in findings_of(_config(), deployment)] == [("drafter", "limited")]
    plugin = replace(hybrid.PLUGIN, build_on_device=None)
    monkeypatch.setattr(deployment_check, "installed_plugin", lambda *_: SimpleNamespace(plugin=plugin))
    [(verdict, _)] = deployment_check._hybrid(_config(), deployment)
    assert verdict == "refused"
    monkeypatch.undo()
    assert [f.slot for f in findings_of(_config(v2=False, asynchronous=False, mode="NONE"), deployment)] == []


def test_on_a_cpu_nothing_is_limited_by_graphs_or_the_host():
    assert _found(_config(v2=False, asynchronous=False, mode="NONE", method="custom_class", device="cpu")) == []
