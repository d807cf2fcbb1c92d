"""What a draft model that can be left out of steps has read, with a runner made of arrays."""

from types import SimpleNamespace

import numpy as np

from vllm_instant.patches.draft_model_skip import DraftModelCatchUp, keeper_of

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


MODULE = SimpleNamespace(set_forward_context=None)


def test_what_came_while_it_did_not_run_is_missed():
    runner = _runner([6, 9])
    keeper = DraftModelCatchUp(runner, MODULE)
    assert keeper.missed(_step()) == [6, 9]
    tables = runner.input_batch.block_table[0].get_numpy_array()
    # It is one token ahead of the target where it drafted last.
    keeper.coverage.draft_read("a", 7, tables[0])
    assert keeper.missed(_step()) == [0, 9]
    runner.input_batch.num_computed_tokens_cpu = np.array([12, 10])
    assert keeper.missed(_step()) == [5, 10]


def test_steps_that_want_no_drafts_are_missed():
    runner = _runner([0, 0])
    keeper = DraftModelCatchUp(runner, MODULE)
    keeper.read_tokens = 9
    assert keeper.propose(None, _step(), {}, (None,) * 7) == [[], []]
    assert keeper.read_tokens == 0
    runner.input_batch.num_computed_tokens_cpu = np.array([1, 1])
    assert keeper.missed(_step()) == [1, 1]


def test_a_request_that_lost_its_blocks_is_read_again_but_for_whole_blocks():
    runner = _runner([6, 9])
    keeper = DraftModelCatchUp(runner, MODULE)
    keeper.missed(_step())
    keeper.coverage.draft_read("a", 6, runner.input_batch.block_table[0].get_numpy_array()[0])
    assert keeper.missed(_step()) == [0, 9]
    assert keeper.missed(_step(resumed=["a"])) == [2, 9]


def test_each_step_is_looked_up_once(monkeypatch):
    runner = _runner([0, 0])
    keeper = DraftModelCatchUp(runner, MODULE)
    looked, covered = [], keeper.coverage.covered
    monkeypatch.setattr(keeper.coverage, "covered", lambda *arguments: looked.append(1) or covered(*arguments))
    for step, of_two in enumerate((2, 4, 6)):
        runner.input_batch.num_computed_tokens_cpu = np.array([step, step])
        if step < 2:
            assert keeper.missed(_step()) == [step, step]
        keeper.propose(None, _step(), {}, (None,) * 7)
        assert len(looked) == of_two


def test_a_runner_has_one_keeper():
    runner = _runner([0, 0])
    assert keeper_of(runner, MODULE) is keeper_of(runner, MODULE)
