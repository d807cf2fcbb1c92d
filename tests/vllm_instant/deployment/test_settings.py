"""Layers, provenance and checks of deployment files."""

import json

import pytest

from vllm_instant import Deployment
from vllm_instant.deployment.errors import DeploymentError
from vllm_instant.deployment.resolved import engine_arguments, installed_plugin
from vllm_instant.deployment.settings import resolve


def test_the_defaults_are_lossless_and_need_no_engine_arguments():
    deployment = resolve()
    assert {slot: choice.plugin for slot, choice in deployment.slots.items()} == {
        "speculation": "goodput",
        "drafter": "suffix",
        "rejection_sampler": "block",
        "batching": "fcfs",
        "experts": "native",
        "attention": "native",
        "streaming": "off",
        "guard": "off",
        "escalation": "off",
    }
    assert not any(installed_plugin(deployment, slot).plugin.lossy for slot in deployment.slots)
    assert engine_arguments(deployment) == {}


def test_command_line_over_environment_over_file_over_default(write_file, monkeypatch):
    path = write_file(
        '[speculation]\nplugin = "fixed"\nnum_draft_tokens = 1\nmax_batch_size = 2\n'
        '[vllm]\nmax_num_seqs = 3\ndtype = "half"\n'
    )
    monkeypatch.setenv("INSTANT_SPECULATION__NUM_DRAFT_TOKENS", "5")
    monkeypatch.setenv("INSTANT_VLLM__MAX_NUM_SEQS", "6")
    deployment = resolve(path, ["vllm.max_num_seqs=7"])
    assert deployment.slots["speculation"].options == {"num_draft_tokens": 5, "max_batch_size": 2}
    assert deployment.vllm == {"max_num_seqs": 7, "dtype": "half"}
    assert deployment.origins == {
        "speculation.plugin": str(path),
        "speculation.num_draft_tokens": "environment variable INSTANT_SPECULATION__NUM_DRAFT_TOKENS",
        "speculation.max_batch_size": str(path),
        "vllm.max_num_seqs": "--instant-set",
        "vllm.dtype": str(path),
    }


def test_the_environment_can_name_the_file(write_file, monkeypatch):
    monkeypatch.setenv("INSTANT_CONFIG", str(write_file('[speculation]\nplugin = "fixed"\nmax_batch_size = 9\n')))
    assert resolve().slots["speculation"].options["max_batch_size"] == 9


def test_nested_engine_arguments_merge_key_by_key(write_file):
    path = write_file('[vllm.speculative_config]\nmethod = "ngram"\nnum_speculative_tokens = 2\n')
    deployment = resolve(path, ["vllm.speculative_config.num_speculative_tokens=4"])
    assert engine_arguments(deployment)["speculative_config"] == {"method": "ngram", "num_speculative_tokens": 4}


def test_a_drafter_has_its_engine_arguments(write_file):
    path = write_file('[drafter]\nplugin = "ngram"\nnum_speculative_tokens = 6\n')
    assert engine_arguments(resolve(path))["speculative_config"] == {
        "method": "ngram",
        "num_speculative_tokens": 6,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }


@pytest.mark.parametrize(
    "tables",
    [
        '[drafter]\nplugin = "ngram"\n',
        '[vllm]\nspeculative_config = { method = "ngram", num_speculative_tokens = 2 }\n',
    ],
)
def test_without_speculation_there_is_no_drafter(write_file, tables):
    path = write_file(tables)
    assert "speculative_config" in engine_arguments(resolve(path))
    assert "speculative_config" not in engine_arguments(resolve(path, ["speculation.plugin=off"]))


@pytest.mark.usefixtures("with_test_plugins")
def test_a_drafter_of_a_plugin_runs_as_custom_class(write_file):
    path = write_file('[drafter]\nplugin = "bigram"\nnum_speculative_tokens = 3\n')
    assert engine_arguments(resolve(path))["speculative_config"] == {
        "method": "custom_class",
        "model": "vllm_instant.patches.drafter.PluginDrafter",
        "num_speculative_tokens": 3,
    }


FUSED = '[attention]\nplugin = "fp8_fused"\n'


@pytest.mark.parametrize(
    ("tables", "backend"),
    [
        (FUSED + '[drafter]\nplugin = "model"\nmodel = "org/name"\n', "CUSTOM"),
        (FUSED + '[vllm.speculative_config]\nmodel = "org/name"\nattention_backend = "TRITON_ATTN"\n', "TRITON_ATTN"),
        (FUSED + '[drafter]\nplugin = "suffix"\n', None),
        ('[drafter]\nplugin = "model"\nmodel = "org/name"\n', None),
    ],
)
def test_a_draft_model_gets_the_attention_of_the_target(write_file, tables, backend):
    """Unless the file names another one: both models have caches of one dtype."""
    drafting = engine_arguments(resolve(write_file(tables)))["speculative_config"]
    assert drafting.get("attention_backend") == backend


def test_a_deployment_survives_its_way_to_another_process(write_file):
    deployment = resolve(write_file('[drafter]\nplugin = "ngram"\n[vllm]\nmax_num_seqs = 3\n'))
    assert Deployment.model_validate_json(deployment.model_dump_json()) == deployment
    json.loads(deployment.model_dump_json())


def test_all_problems_are_reported_at_once(write_file):
    path = write_file(
        '[speculation]\nplugin = "fixed"\nnum_draft_tokens = "x"\nmax_batch_size = -1\n[drafter]\nplugin = "magic"\n'
    )
    with pytest.raises(DeploymentError) as caught:
        resolve(path)
    assert len(caught.value.problems) == 3


def test_environment_values_have_types(monkeypatch):
    monkeypatch.setenv("INSTANT_SPECULATION__PLUGIN", "fixed")
    monkeypatch.setenv("INSTANT_SPECULATION__MAX_BATCH_SIZE", "many")
    with pytest.raises(DeploymentError, match=r"INSTANT_SPECULATION__MAX_BATCH_SIZE.*whole number.*many"):
        resolve()


def test_an_environment_variable_for_no_table_is_a_problem(monkeypatch):
    monkeypatch.setenv("INSTANT_SPECULATON__PLUGIN", "off")
    with pytest.raises(DeploymentError, match=r"INSTANT_SPECULATON__PLUGIN.*did you mean speculation"):
        resolve()


def test_unrelated_variables_with_the_prefix_are_left_alone(monkeypatch):
    monkeypatch.setenv("INSTANT_COFFEE", "yes")
    resolve()


def test_dashes_in_engine_arguments_are_accepted(write_file):
    deployment = resolve(write_file("[vllm]\nmax-num-seqs = 3\nmax-model-len = 5\n"), ["vllm.max_num_seqs=4"])
    assert engine_arguments(deployment) == {"max_num_seqs": 4, "max_model_len": 5}
    assert deployment.origins["vllm.max_num_seqs"] == "--instant-set"


@pytest.mark.parametrize("pair", ["speculation", "speculation.plugin", "=3", ".plugin=off"])
def test_malformed_overrides(pair):
    with pytest.raises(DeploymentError, match=r"expected TABLE.KEY=VALUE"):
        resolve(None, [pair])
