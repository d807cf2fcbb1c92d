"""FULL CUDA graphs for fewer drafts than the maximum: which steps have one, and how vLLM is told."""

from types import SimpleNamespace

import pytest

from vllm_instant import FullGraphs
from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches.full_graphs import PATCH, full_graphs_of, table_of, tiers
from vllm_instant.patches.names import QUALIFIED_NAME

build = pytest.importorskip("vllm.v1.spec_decode.dynamic.utils").build_dynamic_sd_schedule_lookup
CUDAGraphMode = pytest.importorskip("vllm.config.compilation").CUDAGraphMode

[NAME_TIERS, INIT_RUNNER] = PATCH.wraps.values()


def _config(
    mode="FULL_AND_PIECEWISE", v2=True, method="draft_model", table=None, data_parallel=1, moe=False, trims=False
):
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            method=method,
            num_speculative_tokens=6,
            num_speculative_tokens_per_batch_size=table,
            parallel_drafting=False,
            draft_model_config=None,
            enable_adaptive_verification=trims,
        ),
        model_config=SimpleNamespace(is_moe=moe),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode], max_cudagraph_capture_size=512),
        scheduler_config=SimpleNamespace(max_num_seqs=32, scheduler_cls=QUALIFIED_NAME),
        parallel_config=SimpleNamespace(data_parallel_size=data_parallel),
        use_v2_model_runner=v2,
    )


@pytest.fixture
def deployment():
    deployment_env.set_deployment(resolve())
    yield
    deployment_env.clear_deployment()


@pytest.mark.parametrize("maximum", range(1, 33))
@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 8, 256])
def test_the_table_names_the_tiers_and_vllm_reads_them(maximum, max_num_seqs):
    named = set(build(table_of(maximum, max_num_seqs), max_num_seqs, maximum)[1:])
    assert maximum in named
    assert named <= set(tiers(maximum))
    assert len(named) == min(max_num_seqs, len(tiers(maximum)))
    assert max_num_seqs == 1 or 0 in named


def test_tiers_are_powers_of_two():
    assert tiers(1) == (0, 1)
    assert tiers(4) == (0, 1, 2, 4)
    assert tiers(6) == (0, 1, 2, 4, 6)


@pytest.mark.usefixtures("deployment")
def test_on_the_v2_runner_every_tier_is_named_before_vllm_decides():
    config, seen = _config(), []
    NAME_TIERS(lambda: seen.append(config.speculative_config.num_speculative_tokens_per_batch_size), config)
    assert seen == [table_of(6, 32)]
    assert full_graphs_of(config) == FullGraphs(tiers(6), 512)


@pytest.mark.usefixtures("deployment")
@pytest.mark.parametrize(
    "changed",
    [
        {"v2": False},
        {"mode": "NONE"},
        {"mode": "PIECEWISE"},
        {"data_parallel": 2},
        {"method": "suffix"},
        {"table": [(1, 8, 3)]},
    ],
    ids=str,
)
def test_otherwise_the_table_stays_as_it_is(changed):
    config = _config(**changed)
    NAME_TIERS(lambda: None, config)
    assert config.speculative_config.num_speculative_tokens_per_batch_size == changed.get("table")


def test_without_a_deployment_or_with_another_scheduler_nothing_is_named():
    config = _config()
    NAME_TIERS(lambda: None, config)
    assert config.speculative_config.num_speculative_tokens_per_batch_size is None


@pytest.mark.parametrize(
    ("changed", "lengths"),
    [
        ({}, (6,)),
        ({"table": [(1, 8, 3), (9, 32, 0)]}, (0, 3)),
        ({"v2": False}, (6,)),
        ({"v2": False, "method": "custom_class"}, (0,)),
        ({"mode": "FULL_DECODE_ONLY"}, (6,)),
        ({"mode": "FULL"}, None),
        ({"mode": "PIECEWISE"}, None),
        ({"mode": "NONE"}, None),
    ],
    ids=str,
)
def test_the_steps_that_run_as_one_graph(changed, lengths):
    assert full_graphs_of(_config(**changed)) == (None if lengths is None else FullGraphs(lengths, 512))


@pytest.mark.parametrize(("method", "query"), [("custom_class", 1), ("draft_model", 7)])
def test_on_the_v1_runner_drafters_on_the_host_get_the_graphs_of_steps_without_drafts(method, query):
    runner = SimpleNamespace(speculative_config=SimpleNamespace(method=method))

    def init():
        runner.uniform_decode_query_len = 7
        runner.cudagraph_dispatcher = SimpleNamespace(uniform_decode_query_len=7)

    INIT_RUNNER(init, runner)
    assert runner.uniform_decode_query_len == runner.cudagraph_dispatcher.uniform_decode_query_len == query


@pytest.mark.usefixtures("deployment")
def test_with_adaptive_verification_vllm_captures_steps_of_any_number_of_tokens():
    config = _config(trims=True)
    NAME_TIERS(lambda: None, config)
    assert config.speculative_config.num_speculative_tokens_per_batch_size is None
    assert full_graphs_of(config) is None
    assert full_graphs_of(_config(trims=False)) is not None
