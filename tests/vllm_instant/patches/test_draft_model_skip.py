"""What a draft model that can be left out of steps has read, with a runner made of arrays."""

from types import SimpleNamespace

import numpy as np
from patch_harness import wrap

from vllm_instant.patches.draft_model_skip import PATCH, DraftModelCatchUp, catch_up_of
from vllm_instant.patches.names import MODEL_RUNNER

BLOCK = 4


def _runner(computed):
    """Two requests, ``a`` and ``b``, of which the target has computed so much."""
    table = SimpleNamespace(get_numpy_array=lambda: np.arange(20, dtype=np.int32).reshape(2, 10))
    batch = SimpleNamespace(
        num_reqs=2, req_ids=["a", "b"], num_computed_tokens_cpu=np.array(computed), block_table={0: table}
    )
    return SimpleNamespace(drafter=SimpleNamespace(block_size=BLOCK, kv_cache_gid=0), input_batch=batch)


def _step(resumed=()):
    return SimpleNamespace(
        num_scheduled_tokens={"a": 1, "b": 1}, scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(resumed))
    )


def test_what_came_while_it_did_not_run_is_missed():
    runner = _runner([6, 9])
    catch_up = DraftModelCatchUp(runner)
    assert catch_up.missed(_step()) == [6, 9]
    tables = runner.input_batch.block_table[0].get_numpy_array()
    # It is one token ahead of the target where it drafted last.
    catch_up.coverage.draft_read("a", 7, tables[0])
    assert catch_up.missed(_step()) == [0, 9]
    runner.input_batch.num_computed_tokens_cpu = np.array([12, 10])
    assert catch_up.missed(_step()) == [5, 10]


def test_steps_that_want_no_drafts_are_missed():
    runner = _runner([0, 0])
    catch_up = DraftModelCatchUp(runner)
    catch_up.read_tokens = 9
    assert catch_up.propose(None, _step(), {}, (None,) * 7) == [[], []]
    assert catch_up.read_tokens == 0
    runner.input_batch.num_computed_tokens_cpu = np.array([1, 1])
    assert catch_up.missed(_step()) == [1, 1]


def test_a_request_that_lost_its_blocks_is_read_again_but_for_whole_blocks():
    runner = _runner([6, 9])
    catch_up = DraftModelCatchUp(runner)
    catch_up.missed(_step())
    catch_up.coverage.draft_read("a", 6, runner.input_batch.block_table[0].get_numpy_array()[0])
    assert catch_up.missed(_step()) == [0, 9]
    assert catch_up.missed(_step(resumed=["a"])) == [2, 9]


def test_each_step_is_looked_up_once(monkeypatch):
    runner = _runner([0, 0])
    catch_up = DraftModelCatchUp(runner)
    looked, covered = [], catch_up.coverage.covered
    monkeypatch.setattr(catch_up.coverage, "covered", lambda *arguments: looked.append(1) or covered(*arguments))
    for step, of_two in enumerate((2, 4, 6)):
        runner.input_batch.num_computed_tokens_cpu = np.array([step, step])
        if step < 2:
            assert catch_up.missed(_step()) == [step, step]
        catch_up.propose(None, _step(), {}, (None,) * 7)
        assert len(looked) == of_two


def test_a_runner_has_one_catch_up():
    runner = _runner([0, 0])
    assert catch_up_of(runner) is catch_up_of(runner)


def test_finished_requests_are_forgotten_in_a_fixed_order():
    """The order of a set differs between processes, and all ranks must do the same."""
    runner_class = type("Runner", (), {"_update_states": lambda self, scheduler_output: "updated"})
    wrap(PATCH, MODEL_RUNNER, GPUModelRunner=runner_class)
    runner = runner_class()
    vars(runner).update(vars(_runner([0, 0])))
    forgotten = []
    catch_up_of(runner).coverage = SimpleNamespace(forget=forgotten.extend)
    assert runner._update_states(SimpleNamespace(finished_req_ids={"y", "x", "a"})) == "updated"
    assert forgotten == ["a", "x", "y"]
