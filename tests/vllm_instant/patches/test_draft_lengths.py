"""Drafters that make a fixed number of drafts, and padding that no step can hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import scheduler_harness as harness

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches.draft_lengths import fixed_length_reason
from vllm_instant.patches.names import PLAN_ATTRIBUTE
from vllm_instant.patches.scheduler import create_scheduler

DRAFTS = 4


def _config(method="draft_model", parallel=False, ranks=1, target_experts=False, draft_experts=None):
    draft = None if draft_experts is None else SimpleNamespace(is_moe=draft_experts)
    return SimpleNamespace(
        speculative_config=SimpleNamespace(method=method, parallel_drafting=parallel, draft_model_config=draft),
        parallel_config=SimpleNamespace(data_parallel_size=ranks),
        model_config=SimpleNamespace(is_moe=target_experts),
    )


@pytest.mark.parametrize("method", ["ngram", "eagle", "eagle3", "mtp", "draft_model", "dflash", "custom_class"])
def test_methods_that_take_a_number_per_step_may_vary(method):
    assert fixed_length_reason(_config(method)) is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (_config("suffix"), "method suffix draft a fixed number"),
        (_config("ngram_gpu"), "method ngram_gpu"),
        (_config("medusa"), "method medusa"),
        (_config("extract_hidden_states"), "method extract_hidden_states"),
        (_config("eagle3", parallel=True), "parallel drafting"),
        (_config("draft_model", parallel=True, draft_experts=False), "parallel drafting"),
        (_config("mtp", ranks=2, target_experts=True), "data-parallel ranks"),
        (_config("draft_model", ranks=2, draft_experts=True), "data-parallel ranks"),
    ],
)
def test_other_drafters_make_a_fixed_number(config, words):
    assert words in fixed_length_reason(config)


def test_dense_models_with_data_parallelism_may_vary():
    assert fixed_length_reason(_config(ranks=2, draft_experts=False)) is None
    assert fixed_length_reason(_config(target_experts=True)) is None


@pytest.fixture
def make(demo_pair, monkeypatch):
    """A scheduler whose configuration a test may change first."""

    def build(change=lambda config: None, asynchronous=False, drafts=DRAFTS, length=0, caching=False):
        monkeypatch.setenv(deployment_env.VARIABLE, "")
        monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "")
        fixed = ("speculation.plugin=fixed", f"speculation.num_draft_tokens={length}")
        deployment_env.set_deployment(resolve(None, fixed))
        config = harness.engine_config(demo_pair.target, drafts, 16, asynchronous)
        config.cache_config.enable_prefix_caching = caching
        change(config)
        return harness.make_scheduler(create_scheduler, config)

    return build


def _suffix(config):
    config.speculative_config.method = "suffix"


@pytest.mark.engine
@pytest.mark.parametrize("asynchronous", [False, True])
def test_drafters_with_a_fixed_number_keep_it_and_verification_follows_the_plan(make, asynchronous):
    """vLLM's own suffix decoding asserts the configured number: a plan of 0 ended the engine in its first step."""
    scheduler = make(_suffix, asynchronous, length=1)
    scheduler.add_request(harness.make_request(1))
    for step in range(3):
        output = scheduler.schedule()
        assert output.num_spec_tokens_to_schedule == DRAFTS
        assert getattr(output, PLAN_ATTRIBUTE).num_draft_tokens == {"request-1": 1}
        assert len(output.scheduled_spec_decode_tokens.get("request-1", ())) == (1 if step else 0)
        scheduler.update_from_output(output, harness.answer(output, {}))
        if not asynchronous:
            scheduler.update_draft_token_ids(harness.drafts_for(output, DRAFTS))


@pytest.mark.engine
@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_ranks_of_a_mixture_of_experts_make_the_same_number_whatever_they_serve(make, asynchronous):
    def two_ranks(config):
        config.parallel_config.data_parallel_size = 2
        config.model_config.get_num_experts = lambda: 8

    busy, idle = make(two_ranks, asynchronous, length=3), make(two_ranks, asynchronous, length=0)
    for number in range(3):
        busy.add_request(harness.make_request(number))
    idle.add_request(harness.make_request(9))
    assert busy.schedule().num_spec_tokens_to_schedule == idle.schedule().num_spec_tokens_to_schedule == DRAFTS


def _small_threshold(config):
    config.scheduler_config.long_prefill_token_threshold = 16


@pytest.mark.engine
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_cached_prompt_starts_where_its_padding_exceeds_the_threshold(make, asynchronous):
    """Its last token is computed anew, and vLLM would pad it to 17 rows."""
    scheduler = make(_small_threshold, asynchronous, drafts=16, caching=True)
    for attempt in range(2):
        request = harness.make_request(1, prompt_tokens=33, max_tokens=1, request_id=f"r{attempt}")
        scheduler.add_request(request)
        for _ in range(4):
            output = scheduler.schedule()
            is_reading = request.num_computed_tokens < request.num_prompt_tokens
            scheduler.update_from_output(
                output, harness.answer(output, {}, {request.request_id} if is_reading else set())
            )
            if request.is_finished():
                break
        assert request.is_finished()


@pytest.mark.engine
@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_cached_prompt_starts_beside_a_request_that_takes_most_of_a_small_step(
    make, asynchronous, runner, monkeypatch
):
    """Steps of 16 tokens, of which the running request takes 9: nine more for a padded request are never left."""

    def small(config):
        # Only now, because a machine without Triton cannot resolve a configuration of the V2 runner.
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(runner == "V2")))
        config.scheduler_config.max_num_batched_tokens = 16

    scheduler = make(small, asynchronous, drafts=8, length=8, caching=True)
    scheduler.add_request(harness.make_request(1, prompt_tokens=33, request_id="running"))
    for step in range(12):
        if step == 6:
            scheduler.add_request(harness.make_request(1, prompt_tokens=33, request_id="cached"))
        output = scheduler.schedule()
        reading = {
            request_id
            for request_id in output.num_scheduled_tokens
            if scheduler.requests[request_id].num_computed_tokens < scheduler.requests[request_id].num_prompt_tokens
        }
        scheduler.update_from_output(output, harness.answer(output, {}, reading))
        if not asynchronous:
            scheduler.update_draft_token_ids(harness.drafts_for(output, 8))
        if step >= 6:
            assert output.num_scheduled_tokens["running"] == 9
            break
    assert output.num_scheduled_tokens["cached"] == 1
    assert "cached" not in output.scheduled_spec_decode_tokens


@pytest.mark.engine
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_diffusion_language_model_keeps_its_scheduler_and_its_canvas(make, asynchronous):
    """Its canvas is in the place of draft tokens, and no policy may cut it."""

    def diffusion(config):
        config.speculative_config = None
        config.diffusion_config = SimpleNamespace(canvas_length=8)

    scheduler = make(diffusion, asynchronous, length=0)
    [base] = [cls for cls in type(scheduler).__mro__ if cls.__name__.startswith("Diffusion")][:1]
    assert base.__name__ == ("DiffusionAsyncScheduler" if asynchronous else "DiffusionScheduler")
    assert scheduler.num_spec_tokens == 8
    assert scheduler.instant_budget is None
    assert scheduler.dynamic_sd_lookup is None
