"""One message per step: stand-ins for vLLM's classes record the calls."""

from types import SimpleNamespace

import pytest
from patch_harness import wrap

from vllm_instant.patches.cpu import single_rpc
from vllm_instant.patches.names import CPU_MODEL_RUNNER, ENGINE_CORE, SCHEDULER


@pytest.fixture
def runner_class():
    class Runner:
        num_spec_tokens = 4

        def __init__(self, connector=None, batches=1):
            self.vllm_config = SimpleNamespace(kv_transfer_config=connector, max_concurrent_batches=batches)
            self.execute_model_state = None
            self.drafts = "drafts"

        def execute_model(self, scheduler_output, intermediate_tensors=None):
            if scheduler_output.num_tokens == 0:
                return SimpleNamespace(sampled_token_ids=[])
            self.execute_model_state = "logits"

        def sample_tokens(self, grammar_output):
            assert self.execute_model_state == "logits"
            self.execute_model_state = None
            return SimpleNamespace(sampled_token_ids=[[5]], grammar=grammar_output)

        def take_draft_token_ids(self):
            return self.drafts

    wrap(single_rpc.PATCH, CPU_MODEL_RUNNER, CPUModelRunner=Runner)
    return Runner


def _step(num_tokens=3, structured=False):
    return SimpleNamespace(num_tokens=num_tokens, has_structured_output_requests=structured)


def test_a_step_is_answered_with_tokens_and_drafts_at_once(runner_class):
    runner = runner_class()
    output = runner.execute_model(_step())
    assert output.sampled_token_ids == [[5]]
    assert output.grammar is None
    assert output.instant_drafts == "drafts"
    assert runner.execute_model_state is None


def test_structured_output_waits_for_its_bitmask_and_brings_drafts_then(runner_class):
    runner = runner_class()
    assert runner.execute_model(_step(structured=True)) is None
    output = runner.sample_tokens("bitmask")
    assert output.grammar == "bitmask"
    assert output.instant_drafts == "drafts"


@pytest.mark.parametrize("setting", [{"batches": 2}, {"connector": "nixl"}])
def test_where_others_count_on_two_questions_there_are_two(runner_class, setting):
    runner = runner_class(**setting)
    assert runner.execute_model(_step()) is None
    assert not hasattr(runner.sample_tokens(None), "instant_drafts")


def test_steps_without_tokens_and_servers_without_speculation(runner_class):
    runner = runner_class()
    assert runner.execute_model(_step(num_tokens=0)).sampled_token_ids == []
    runner.num_spec_tokens = 0
    assert not hasattr(runner.execute_model(_step()), "instant_drafts")


@pytest.fixture
def core():
    class Scheduler:
        instant_nothing_to_draft = False

        def __init__(self):
            self.drafts = []

        def update_from_output(self, scheduler_output, model_runner_output):
            return "outputs"

        def update_draft_token_ids(self, drafts):
            self.drafts.append(drafts)

    class EngineCore:
        def __init__(self):
            self.scheduler = Scheduler()
            self.asked = 0

        def post_step(self, model_executed):
            self.asked += 1

    wrap(single_rpc.PATCH, SCHEDULER, Scheduler=Scheduler)
    wrap(single_rpc.PATCH, ENGINE_CORE, EngineCore=EngineCore)
    return EngineCore()


def test_drafts_that_came_with_the_tokens_are_not_asked_for(core):
    assert core.scheduler.update_from_output(None, SimpleNamespace(instant_drafts="drafts")) == "outputs"
    core.post_step(True)
    assert core.scheduler.drafts == ["drafts"]
    assert core.asked == 0


def test_no_drafts_that_came_are_no_reason_to_ask_either(core):
    core.scheduler.update_from_output(None, SimpleNamespace(instant_drafts=None))
    core.post_step(True)
    assert core.scheduler.drafts == []
    assert core.asked == 0


def test_drafts_of_a_step_whose_successor_gets_none_are_passed_over(core):
    core.scheduler.instant_nothing_to_draft = True
    core.scheduler.update_from_output(None, SimpleNamespace(instant_drafts="drafts"))
    core.post_step(True)
    assert core.scheduler.drafts == []


def test_drafts_that_did_not_come_are_asked_for_and_old_ones_are_not_used_again(core):
    core.scheduler.update_from_output(None, SimpleNamespace(instant_drafts="drafts"))
    core.post_step(True)
    core.scheduler.update_from_output(None, SimpleNamespace())
    core.post_step(True)
    assert core.asked == 1
    assert core.scheduler.drafts == ["drafts"]
