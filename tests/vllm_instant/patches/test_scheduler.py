"""The budget on vLLM's own scheduler classes, synchronous and asynchronous, without a model or a device."""

import itertools

import pytest
import scheduler_harness as harness

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches.names import PLAN_ATTRIBUTE
from vllm_instant.patches.scheduler import create_scheduler

pytestmark = pytest.mark.engine

DRAFTS = 4


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def asynchronous(request):
    return request.param


@pytest.fixture
def make(asynchronous, demo_pair, monkeypatch):
    """A scheduler under a deployment given as overrides."""

    def build(*overrides, drafts=DRAFTS):
        monkeypatch.setenv(deployment_env.VARIABLE, "")
        monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "")
        if not any(override.startswith("speculation.plugin=") for override in overrides):
            overrides = ("speculation.plugin=fixed", *overrides)
        deployment_env.set_deployment(resolve(None, overrides))
        config = harness.engine_config(demo_pair.target, drafts, 16, asynchronous)
        return harness.make_scheduler(create_scheduler, config)

    return build


def _step(scheduler, asynchronous, accept=1, drafted=DRAFTS):
    output = scheduler.schedule()
    scheduler.get_grammar_bitmask(output)  # as the engine core does, right after it dispatched the step
    accepted = {r: min(accept, len(d)) for r, d in output.scheduled_spec_decode_tokens.items()}
    prefilling = {r for r in output.num_scheduled_tokens if scheduler.requests[r].is_prefill_chunk}
    scheduler.update_from_output(output, harness.answer(output, accepted, prefilling))
    if not asynchronous:
        scheduler.update_draft_token_ids(harness.drafts_for(output, drafted))
    return output


def test_the_base_class_follows_the_scheduling_mode(make, asynchronous):
    scheduler = make()
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    assert ("AsyncScheduler" in names) == asynchronous


@pytest.mark.parametrize("length", [0, 1, 3])
def test_the_verified_batch_really_shrinks(make, asynchronous, length):
    scheduler = make(f"speculation.num_draft_tokens={length}")
    for number in range(3):
        scheduler.add_request(harness.make_request(number))
    prefill = _step(scheduler, asynchronous)
    assert prefill.num_spec_tokens_to_schedule == length
    for _ in range(3):
        decode = _step(scheduler, asynchronous)
        assert decode.num_spec_tokens_to_schedule == length
        assert set(decode.num_scheduled_tokens.values()) == {1 + length}
        assert {len(d) for d in decode.scheduled_spec_decode_tokens.values()} == ({length} if length else set())


@pytest.mark.usefixtures("with_test_plugins")
def test_every_request_gets_its_own_length(make, asynchronous):
    scheduler = make("speculation.plugin=cycling")
    for number in range(5):
        scheduler.add_request(harness.make_request(number))
    planned = getattr(_step(scheduler, asynchronous), PLAN_ATTRIBUTE).num_draft_tokens
    assert len(set(planned.values())) == 5
    for _ in range(8):
        output = scheduler.schedule()
        for request_id, scheduled in output.num_scheduled_tokens.items():
            assert scheduled == 1 + planned[request_id]
            assert len(output.scheduled_spec_decode_tokens.get(request_id, ())) == planned[request_id]
        planned = getattr(output, PLAN_ATTRIBUTE).num_draft_tokens
        assert output.num_spec_tokens_to_schedule == max(planned.values())
        scheduler.get_grammar_bitmask(output)
        scheduler.update_from_output(output, harness.answer(output, {}))
        if not asynchronous:
            scheduler.update_draft_token_ids(harness.drafts_for(output, DRAFTS))


def test_counts_are_exact(make, asynchronous):
    scheduler = make()
    for number in range(2):
        scheduler.add_request(harness.make_request(number))
    for _ in range(4):
        _step(scheduler, asynchronous, accept=3)
    totals = scheduler.instant_totals()["speculation"]
    # The first step reads the prompts; three steps verify four drafts of two requests and keep three of each.
    assert totals == {
        "budgeted": 4 * 2 * 4,
        "proposed": 3 * 2 * 4,
        "accepted": 3 * 2 * 3,
        "steps": 4,
        "steps_without_drafting": 0,
        "full_graph_steps": 0,
        "piecewise_steps": 0,
    }
    state = scheduler.instant_budget.states["request-0"]
    assert state.num_output_tokens == 1 + 3 * 4


def test_a_request_that_is_still_reading_its_prompt_gets_no_drafts(make, asynchronous):
    scheduler = make()
    scheduler.max_num_scheduled_tokens = 10
    scheduler.add_request(harness.make_request(0, prompt_tokens=16))
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"request-0": 10}
    assert getattr(output, PLAN_ATTRIBUTE).num_draft_tokens == {}
    assert output.num_spec_tokens_to_schedule == 0


def test_a_draft_model_does_not_run_in_a_step_that_reads_a_prompt(make, asynchronous):
    scheduler = make()
    # As a scheduler finds it with a draft model; the harness has no weights of one.
    scheduler._instant_model_waits = not asynchronous
    scheduler.add_request(harness.make_request(0))
    first = _step(scheduler, asynchronous)
    planned = getattr(first, PLAN_ATTRIBUTE)
    assert set(planned.num_draft_tokens.values()) == {DRAFTS if asynchronous else 0}
    assert first.num_spec_tokens_to_schedule == (DRAFTS if asynchronous else 0)
    assert getattr(_step(scheduler, asynchronous), PLAN_ATTRIBUTE).num_draft_tokens == {"request-0": DRAFTS}
    # The second request's prompt is read in two pieces; nothing is drafted until its first token is out.
    scheduler.max_num_scheduled_tokens = 20
    scheduler.add_request(harness.make_request(1, prompt_tokens=24))
    plans = [getattr(_step(scheduler, asynchronous), PLAN_ATTRIBUTE).num_draft_tokens for _ in range(3)]
    if not asynchronous:
        assert plans == [{"request-0": 0}, {"request-0": 0, "request-1": 0}, {"request-0": DRAFTS, "request-1": DRAFTS}]


def test_a_model_waits_only_where_it_can_be_skipped(make, asynchronous):
    scheduler = make()
    assert not scheduler._instant_model_waits, "a lookup takes no time"
    method = scheduler.vllm_config.speculative_config
    method.method = "draft_model"
    again = harness.make_scheduler(create_scheduler, scheduler.vllm_config)
    assert again._instant_model_waits == (not asynchronous)


def test_finished_requests_are_forgotten(make, asynchronous):
    from vllm.v1.request import RequestStatus

    scheduler = make()
    scheduler.add_request(harness.make_request(0))
    scheduler.add_request(harness.make_request(1, max_tokens=1))
    _step(scheduler, asynchronous)
    assert "request-1" not in scheduler.instant_budget.states
    scheduler.finish_requests("request-0", RequestStatus.FINISHED_ABORTED)
    assert "request-0" not in scheduler.instant_budget.states


def test_drafts_that_are_only_padding_are_not_counted(make, asynchronous):
    if asynchronous:
        pytest.skip("placeholders stand for real drafts there")
    scheduler = make()
    scheduler.add_request(harness.make_request(0))
    _step(scheduler, asynchronous)
    output = scheduler.schedule()
    output.scheduled_spec_decode_tokens["request-0"] = [-1] * DRAFTS
    scheduler.update_from_output(output, harness.answer(output, {}))
    assert scheduler.instant_totals()["speculation"]["proposed"] == 0


def test_without_a_drafter_there_is_no_budget(make):
    scheduler = make(drafts=0)
    assert scheduler.instant_budget is None
    totals = scheduler.instant_totals()
    [finding] = totals.pop("findings")
    assert (finding["slot"], finding["verdict"]) == ("drafter", "limited")
    assert totals == {"speculation": None, "batching": None, "failures": []}


@pytest.mark.usefixtures("with_test_plugins")
def test_a_failing_policy_leaves_stock_behaviour(make, asynchronous):
    scheduler = make("speculation.plugin=raising")
    scheduler.add_request(harness.make_request(0))
    for _ in range(9):
        output = _step(scheduler, asynchronous)
    assert output.num_scheduled_tokens == {"request-0": 1 + DRAFTS}
    assert scheduler.instant_totals()["failures"] == [
        {"slot": "speculation", "plugin": "raising", "hook": "get_num_draft_tokens", "count": 1}
    ]


@pytest.mark.parametrize(("accept", "lengths"), [(DRAFTS, {DRAFTS}), (0, {0})], ids=["perfect", "hopeless"])
def test_goodput_finds_out_on_both_schedulers(make, asynchronous, accept, lengths):
    """Here a step costs the same whatever is in it, so that perfect drafts are worth their full length."""
    scheduler = make("speculation.plugin=goodput", "speculation.keep_costs=false")
    ticks = itertools.count()
    scheduler.instant_budget._clock = lambda: next(ticks) * 1e-3
    for number in range(4):
        scheduler.add_request(harness.make_request(number, max_tokens=900))
    for _ in range(60):
        _step(scheduler, asynchronous, accept)
    granted = [getattr(_step(scheduler, asynchronous, accept), PLAN_ATTRIBUTE).num_draft_tokens for _ in range(30)]
    usual = max(
        set(map(frozenset, (plan.values() for plan in granted))),
        key=lambda g: sum(set(p.values()) == g for p in granted),
    )
    assert set(usual) == lengths
    reasons = {decision["reason"] for decision in scheduler.instant_decisions(30)}
    assert reasons & ({"draft"} if accept else {"off"})


def test_nothing_is_fetched_from_workers_when_nothing_was_drafted(make, asynchronous):
    scheduler = make("speculation.num_draft_tokens=0")
    scheduler.add_request(harness.make_request(0))
    _step(scheduler, asynchronous)
    assert scheduler.instant_nothing_to_draft
    scheduler = make("speculation.num_draft_tokens=2")
    scheduler.add_request(harness.make_request(1))
    _step(scheduler, asynchronous)
    assert not scheduler.instant_nothing_to_draft


def test_a_client_overrules_the_policy_for_its_request(make, asynchronous):
    scheduler = make()
    for number, wish in enumerate(("off", 2, "auto", 99)):
        request = harness.make_request(number)
        request.sampling_params.extra_args = {"instant_speculation": wish}
        scheduler.add_request(request)
    for _ in range(3):
        output = _step(scheduler, asynchronous)
    assert list(getattr(output, PLAN_ATTRIBUTE).num_draft_tokens.values()) == [0, 2, DRAFTS, DRAFTS]


@pytest.fixture
def clock():
    """A clock that advances by a millisecond per reading and by whatever is added to ``now``."""

    class Clock:
        now = 0.0

        def __call__(self):
            self.now += 1e-3
            return self.now

    return Clock()


def test_step_times_add_up_to_wall_clock_time_while_busy(make, asynchronous, clock):
    scheduler = make()
    scheduler.instant_budget._clock = clock
    scheduler.add_request(harness.make_request(0))
    _step(scheduler, asynchronous)
    seen = []
    scheduler.instant_budget.policy.instance.observe = seen.append
    began = clock.now
    _step(scheduler, asynchronous)
    clock.now += 0.05  # time between two steps is a part of the cost of serving
    _step(scheduler, asynchronous)
    elapsed = clock.now - began
    scheduler.instant_budget.on_model_executing()
    assert sum(outcome.seconds for outcome in seen[-2:]) == pytest.approx(elapsed, rel=0.2)


def test_idle_time_is_not_counted_as_step_time(make, asynchronous, clock):
    scheduler = make()
    scheduler.instant_budget._clock = clock
    scheduler.add_request(harness.make_request(0, max_tokens=1))
    _step(scheduler, asynchronous)
    clock.now += 60.0
    seen = []
    scheduler.instant_budget.policy.instance.observe = seen.append
    scheduler.add_request(harness.make_request(1))
    _step(scheduler, asynchronous)
    scheduler.instant_budget.on_model_executing()
    assert seen[-1].seconds < 0.1


def test_per_request_metrics_stay_as_the_user_set_them(make, monkeypatch):
    monkeypatch.delenv(deployment_env.REPORT_DRAFTS, raising=False)
    assert make().spec_decode_metrics_level == "none"
    monkeypatch.setenv(deployment_env.REPORT_DRAFTS, "1")
    assert make().spec_decode_metrics_level == "summary"


@pytest.mark.parametrize("option", [{"logprob_token_ids": [5, 6], "logprobs": 2}])
def test_beside_a_request_that_the_rejection_sampler_cannot_serve_no_request_has_drafts(make, asynchronous, option):
    scheduler = make("speculation.num_draft_tokens=3")
    for number in range(2):
        scheduler.add_request(harness.make_request(number))
    for _ in range(4):
        output = _step(scheduler, asynchronous)
    assert all(len(drafts) == 3 for drafts in output.scheduled_spec_decode_tokens.values())
    special = harness.make_request(9)
    for name, value in option.items():
        setattr(special.sampling_params, name, value)
    scheduler.add_request(special)
    for _ in range(3):
        output = _step(scheduler, asynchronous)
        assert len(output.num_scheduled_tokens) == 3
        assert not any(output.scheduled_spec_decode_tokens.values())
        assert not any(getattr(output, PLAN_ATTRIBUTE).num_draft_tokens.values())
    scheduler.finish_requests(special.request_id, type(special.status).FINISHED_ABORTED)
    for _ in range(3):
        output = _step(scheduler, asynchronous)
    assert sorted(map(len, output.scheduled_spec_decode_tokens.values())) == [3, 3]
