"""Latency slo and the cost file."""

import json
import threading
import time

import numpy as np
import pytest

from vllm_instant import RequestState, UpcomingStep
from vllm_instant_plugins.goodput.latency_slo import MAX_WEIGHT, LatencySlo
from vllm_instant_plugins.state_store import PersistentState

BOTH = np.array([0, 1])


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def _slo(**slo):
    clock = Clock()
    made = LatencySlo(clock=clock, **slo)
    for index in (0, 1):
        made.enter(index)
    return made, clock


def test_requests_behind_their_goal_weigh_more():
    slo, clock = _slo(itl_seconds=0.020)
    for step in range(20):
        clock.now = 0.020 * step
        slo.observe(BOTH, np.array([2, 1]))
    ahead, on_time = slo.weights(BOTH)
    assert ahead == pytest.approx(0.5, rel=0.1)
    assert on_time == pytest.approx(1.0, rel=0.05)


def test_weights_are_bounded_and_neutral_before_the_second_token():
    slo, clock = _slo(itl_seconds=0.001)
    assert slo.weights(BOTH).tolist() == [1.0, 1.0]
    slo.observe(BOTH, np.array([1, 1]))
    assert slo.weights(BOTH).tolist() == [1.0, 1.0]
    clock.now = 60.0
    slo.observe(BOTH, np.array([1, 100_000_000]))
    assert slo.weights(BOTH).tolist() == [MAX_WEIGHT, 1 / MAX_WEIGHT]


def test_an_index_that_is_used_again_starts_anew():
    slo, clock = _slo(itl_seconds=0.010)
    slo.observe(BOTH, np.array([1, 1]))
    clock.now = 5.0
    slo.observe(BOTH, np.array([1, 1]))
    slo.enter(0)
    fresh, old = slo.weights(BOTH)
    assert (fresh, old) == (1.0, MAX_WEIGHT)


def test_the_longest_step():
    slo, _ = _slo(itl_seconds=0.030, ttft_seconds=0.2)
    one = [RequestState("r", 1, 1, 0.0)]
    assert slo.max_seconds(UpcomingStep(one, 4)) == 0.030
    assert slo.max_seconds(UpcomingStep(one, 4, num_waiting=2, max_wait=0.19)) == pytest.approx(0.010)
    assert slo.max_seconds(UpcomingStep(one, 4, num_waiting=2, max_wait=3.0)) == 0.0
    assert LatencySlo().max_seconds(UpcomingStep(one, 4)) == np.inf
    assert LatencySlo().weights(BOTH) is None


def test_a_file_for_each_identity(tmp_path):
    one, other = PersistentState(tmp_path, {"model": "a"}), PersistentState(tmp_path, {"model": "b"})
    assert one.load() is None
    one.save({"weights": [1.0]})
    assert one.load() == {"weights": [1.0]}
    assert other.load() is None
    assert PersistentState(tmp_path, {"model": "a"}).load() == {"weights": [1.0]}


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"format": 99}', '{"format": 1, "identity": {}, "costs": {}}', "\0"]
)
def test_a_file_that_is_not_ours_is_none(tmp_path, content):
    store = PersistentState(tmp_path, {"model": "a"})
    store.path.parent.mkdir(exist_ok=True)
    store.path.write_text(content)
    assert store.load() is None


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store = PersistentState(tmp_path / "file", {"model": "a"})
    store.save({})
    assert "not kept" in caplog.text


def test_saving_in_the_background_does_not_wait(tmp_path):
    store = PersistentState(tmp_path, {"model": "a"})
    store.save_in_background({"weights": [2.0]})
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon:
            thread.join(5)
    assert json.loads(store.path.read_text())["costs"] == {"weights": [2.0]}


def test_the_last_save_wins(tmp_path, monkeypatch):
    """A write that still runs in the background neither disturbs the last one nor comes after it."""
    kept = PersistentState(tmp_path, {"device": "a"})
    began, write = threading.Event(), kept._write

    def slowly(knowledge):
        if knowledge["number"] == 1:
            began.set()
            time.sleep(0.1)
        write(knowledge)

    monkeypatch.setattr(kept, "_write", slowly)
    kept.save_in_background({"number": 1})
    assert began.wait(5)
    kept.save({"number": 2})
    assert kept.load() == {"number": 2}
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
