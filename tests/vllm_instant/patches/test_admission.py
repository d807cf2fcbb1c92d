"""Batching policies on vLLM's own scheduler classes, synchronous and asynchronous, without a model or a device."""

import pytest
import scheduler_harness as harness

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches.scheduler import create_scheduler

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("with_test_plugins")]


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def asynchronous(request):
    return request.param


@pytest.fixture
def make(asynchronous, demo_pair, monkeypatch):
    """A scheduler with three places under a batching plugin; without speculation unless ``drafts`` are asked for."""

    def build(plugin, *overrides, drafts=0, places=3, change=lambda config: None):
        monkeypatch.setenv(deployment_env.VARIABLE, "")
        monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "")
        deployment_env.set_deployment(
            resolve(None, (f"batching.plugin={plugin}", "speculation.plugin=fixed", *overrides))
        )
        config = harness.engine_config(demo_pair.target, drafts, places, asynchronous)
        change(config)
        return harness.make_scheduler(create_scheduler, config)

    return build


def _step(scheduler, tokens=1):
    output = scheduler.schedule()
    scheduler.get_grammar_bitmask(output)
    reading = {
        request_id for request_id in output.num_scheduled_tokens if scheduler.requests[request_id].is_prefill_chunk
    }
    scheduler.update_from_output(output, harness.answer(output, {}, reading))
    return output


def _started(output):
    return [new.req_id for new in output.scheduled_new_reqs]


def _add(scheduler, count, **options):
    for number in range(count):
        scheduler.add_request(harness.make_request(number, **options))


def test_waiting_requests_start_in_the_policys_order(make):
    scheduler = make("backwards")
    _add(scheduler, 7)
    assert _started(_step(scheduler)) == ["request-6", "request-5", "request-4"]
    assert len(scheduler.waiting) == 4
    totals = scheduler.instant_totals()["batching"]
    assert totals["started"] == totals["started_early"] == 3
    assert totals["measures"] == {"asked": 1.0}


def test_stock_order_without_a_batching_plugin(make):
    scheduler = make("fcfs", drafts=4)
    assert scheduler.instant_batching is None
    _add(scheduler, 5)
    assert _started(_step(scheduler)) == ["request-0", "request-1", "request-2"]


def test_the_policy_is_not_asked_while_all_places_are_taken(make):
    scheduler = make("backwards")
    _add(scheduler, 7)
    for _ in range(5):
        _step(scheduler)
    assert scheduler.instant_totals()["batching"]["measures"] == {"asked": 1.0}


def test_it_works_beside_a_speculation_budget(make):
    scheduler = make("backwards", drafts=4)
    _add(scheduler, 5)
    _step(scheduler)
    states = scheduler.instant_budget.states
    assert states is scheduler.instant_requests.states
    assert states["request-4"].num_output_tokens == 1, "both policies see the same request"


def test_ended_and_aborted_requests_are_told_apart(make):
    from vllm.v1.request import RequestStatus

    scheduler = make("backwards")
    _add(scheduler, 3, max_tokens=2)
    scheduler.add_request(harness.make_request(9))
    for _ in range(4):
        _step(scheduler)
    scheduler.finish_requests("request-9", RequestStatus.FINISHED_ABORTED)
    policy = scheduler.instant_batching.policy.instance
    whole, aborted = sorted(policy.ended)[:3], policy.ended[-1]
    assert whole == [("request-0", 2, True), ("request-1", 2, True), ("request-2", 2, True)]
    assert (aborted[0], aborted[2]) == ("request-9", False)
    assert scheduler.instant_requests.states == {}


def test_who_waits_can_be_aborted(make):
    from vllm.v1.request import RequestStatus

    scheduler = make("backwards")
    _add(scheduler, 6)
    _step(scheduler)
    scheduler.finish_requests(["request-0", "request-2"], RequestStatus.FINISHED_ABORTED)
    assert [request.request_id for request in scheduler.waiting] == ["request-1"]
    assert scheduler.get_request_counts() == (3, 1)


def test_no_request_starts_while_the_policy_holds_the_queue(make):
    scheduler = make("backwards", "batching.max_num_admitted=1")
    _add(scheduler, 4)
    assert _started(_step(scheduler)) == ["request-3"]
    assert _started(_step(scheduler)) == ["request-2"]


def _few_blocks(config):
    config.cache_config.num_gpu_blocks = 12


def test_victims_are_the_policys(make):
    """Blocks run out: vLLM would take who started last, the policy takes request 1."""
    scheduler = make("backwards", "batching.victim=request-1", change=_few_blocks)
    for number in range(3):
        scheduler.add_request(harness.make_request(number, prompt_tokens=60))
    preempted = []
    for _ in range(120):
        output = _step(scheduler)
        preempted += [r.request_id for r in scheduler.waiting if r.num_preemptions]
        if preempted:
            break
    assert preempted == ["request-1"]
    assert scheduler.instant_totals()["batching"]["preemptions"] == 1
    assert scheduler.instant_requests.states["request-1"].num_preemptions == 1
    assert "request-1" not in output.num_scheduled_tokens


def test_prompts_are_read_in_pieces_beside_those_that_decode(make):
    scheduler = make("backwards", "batching.prompt_tokens=20")
    scheduler.add_request(harness.make_request(0, prompt_tokens=16))
    assert _step(scheduler).num_scheduled_tokens == {"request-0": 16}, "no other request is disturbed"
    scheduler.add_request(harness.make_request(1, prompt_tokens=90))
    read = []
    while len(read) < 8 and sum(read) < 90:
        scheduled = _step(scheduler).num_scheduled_tokens
        assert scheduled["request-0"] == 1
        read.append(scheduled["request-1"])
    assert read == [20, 20, 20, 20, 10]
    assert scheduler.max_num_scheduled_tokens > 1000, "what vLLM was configured with comes back"
    assert scheduler.scheduler_config.long_prefill_token_threshold == 0


@pytest.mark.parametrize("prompt_tokens", [1, 16])
def test_a_one_token_prompt_starts_beside_decoding_requests_under_any_limit(make, prompt_tokens):
    """With speculation vLLM pads it to 1 + K rows, which count against the limit of prompt tokens."""
    scheduler = make("backwards", f"batching.prompt_tokens={prompt_tokens}", drafts=16)
    scheduler.add_request(harness.make_request(0, prompt_tokens=16))
    _step(scheduler)
    for number in (1, 2):
        scheduler.add_request(harness.make_request(number, prompt_tokens=1))
        assert f"request-{number}" in _step(scheduler).num_scheduled_tokens


def test_explicit_priority_is_respected(make):
    def by_priority(config):
        config.scheduler_config.policy = "priority"

    scheduler = make("backwards", change=by_priority)
    _add(scheduler, 6)
    urgent = harness.make_request(7)
    urgent.priority = -1
    scheduler.add_request(urgent)
    assert _started(_step(scheduler)) == ["request-7", "request-5", "request-4"]


def test_a_request_that_cannot_start_lets_the_others_pass(make):
    """A LoRA beyond ``max_loras``: vLLM skips the request and puts it back."""
    from vllm.config import LoRAConfig
    from vllm.lora.request import LoRARequest

    def with_lora(config):
        config.lora_config = LoRAConfig(max_loras=1, max_lora_rank=8)

    scheduler = make("backwards", change=with_lora)
    for number, lora in enumerate((0, 2, 0, 1)):
        request = harness.make_request(number)
        if lora:
            request.lora_request = LoRARequest(f"lora {lora}", lora, "/nowhere")
        scheduler.add_request(request)
    assert _started(_step(scheduler)) == ["request-3", "request-2", "request-0"]
    assert [request.request_id for request in scheduler.waiting] == ["request-1"]


def test_a_failing_policy_leaves_first_come_first_served(make):
    scheduler = make("backwards", "batching.fail=true")
    _add(scheduler, 5)
    assert _started(_step(scheduler)) == ["request-0", "request-1", "request-2"]
    failures = scheduler.instant_totals()["failures"]
    assert failures == [{"slot": "batching", "plugin": "backwards", "hook": "admit", "count": 1}]


@pytest.mark.parametrize("order", ["0,0", "9", "-1"])
def test_an_order_that_is_none_counts_as_a_failure(make, order):
    scheduler = make("backwards", f'batching.order="{order}"')
    _add(scheduler, 5)
    assert _started(_step(scheduler)) == ["request-0", "request-1", "request-2"]
    assert scheduler.instant_totals()["failures"][0]["hook"] == "admit"


def test_a_pause_and_a_reset_of_the_cache_lose_no_request(make):
    from vllm.v1.core.sched.interface import PauseState

    scheduler = make("backwards")
    _add(scheduler, 5)
    _step(scheduler)
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert _step(scheduler).num_scheduled_tokens == {}
    scheduler.set_pause_state(PauseState.UNPAUSED)
    scheduler.reset_prefix_cache(reset_running_requests=True)
    assert len(scheduler.waiting) == 5
    output = _step(scheduler)
    assert sorted(output.num_scheduled_tokens) == ["request-2", "request-3", "request-4"]


def test_the_learned_policy_sends_the_short_one_first(make, tmp_path):
    scheduler = make("similarity", f'batching.lengths_folder="{tmp_path}"', places=1)
    for number in range(55):
        request = harness.make_request(number, prompt_tokens=40, max_tokens=40 if number % 2 else 2)
        scheduler.add_request(request)
    for _ in range(3000):
        if not scheduler.requests:
            break
        _step(scheduler)
    scheduler.instant_background_work()
    assert scheduler.instant_totals()["batching"]["measures"]["finished_requests_learned"] == 55
    scheduler.add_request(harness.make_request(101, prompt_tokens=40, max_tokens=40))
    scheduler.add_request(harness.make_request(102, prompt_tokens=40, max_tokens=2))
    assert _started(_step(scheduler)) == ["request-102"]
    [decision] = scheduler.instant_decisions(5, "request-102", queue=True)
    assert decision["older_waiting"] == 1
    assert decision["expected_tokens"] < 10
    scheduler.instant_close()
    assert list(tmp_path.glob("*.json"))
