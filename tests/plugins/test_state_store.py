"""Stored files with any content: the server starts as if there were none."""

import json
import os

import pytest

from vllm_instant import PluginContext, RequestState, StepOutcome, UpcomingStep
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.scheduling import SchedulerSnapshot
from vllm_instant.patches.plugin_factory import build_guarded
from vllm_instant_plugins import state_store
from vllm_instant_plugins.goodput.policy import GoodputPolicy
from vllm_instant_plugins.state_store import PersistentState

IDENTITY = {"model": "m", "device": "cpu"}


def stored(tmp_path):
    return PersistentState(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    "state",
    [
        '{"noise": Infinity}',
        '{"noise": NaN}',
        '{"noise": 1e999}',
        '{"noise": [[1e308]]}',
        '{"noise": -1e16}',
        '{"noise": 1' + "0" * 5000 + "}",
        '{"noise": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "[]",
        "7",
        "{",
    ],
)
def test_numbers_that_nothing_measures_are_as_good_as_no_file(tmp_path, state):
    store = stored(tmp_path)
    store.save({"noise": 1.0})
    assert store.load() == {"noise": 1.0}
    whole = store.path.read_text()
    store.path.write_text(whole.replace('{"noise": 1.0}', state))
    assert store.load() is None


def test_files_that_are_no_files(tmp_path):
    store = stored(tmp_path)
    store.path.mkdir()
    assert store.load() is None
    store.path.rmdir()
    os.mkfifo(store.path)
    assert store.load() is None
    store.path.unlink()
    store.path.write_bytes(bytes(range(256)))
    assert store.load() is None
    store.path.unlink()
    store.path.symlink_to(store.path)
    assert store.load() is None


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(state_store, "MAX_BYTES", 200)
    store = stored(tmp_path)
    store.save({"a": [1.0] * 100})
    assert store.load() is None


def test_nothing_is_left_behind_by_a_write_that_fails(tmp_path, monkeypatch):
    store = stored(tmp_path)
    store.save({"a": 1})
    for state in ({"a": float("nan")}, {"a": object()}):
        store.save(state)
        assert store.load() == {"a": 1}
    monkeypatch.setattr(type(store.path), "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    store.save({"a": 2})
    assert store.load() == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == [store.path.name]


def test_a_link_at_a_name_that_can_be_guessed_is_not_followed(tmp_path):
    store = stored(tmp_path / "shared")
    (tmp_path / "shared").mkdir()
    other = tmp_path / "victim"
    other.write_text("untouched")
    store.path.with_suffix(f".{os.getpid()}.part").symlink_to(other)
    store.save({"a": 1})
    assert store.load() == {"a": 1}
    assert other.read_text() == "untouched"


def _policy(slot, tmp_path):
    deployment = resolve(
        None,
        [
            "speculation.plugin=goodput",
            f"speculation.costs_folder={tmp_path}",
            "batching.plugin=similarity",
            f"batching.lengths_folder={tmp_path}",
            "drafter.plugin=ngram",
        ],
    )
    context = PluginContext(
        model="m", max_model_len=1024, max_num_seqs=8, vocab_size=100, num_speculative_tokens=4, device="cpu",
        identity=IDENTITY,
    )  # fmt: skip
    return build_guarded(slot, deployment, context)


def _costs():
    costs = GoodputPolicy(4, 8).costs
    return costs.state()


@pytest.mark.parametrize(
    "changed",
    [
        {"noise": 1e15},
        {"observations": -5},
        {"max_measured_rows": 1e12},
        {"max_measured_rows": "x"},
        {"weights": "w"},
        {"weights": [1e14] * 100},
        {"weights": None},
        {"covariance": [[-1e9]]},
        {"knots": {}},
    ],
)
def test_goodput_starts_with_any_costs(tmp_path, changed):
    good = json.loads(json.dumps(_costs()))
    size = len(good["weights"])
    if isinstance(changed.get("weights"), list):
        changed = {"weights": changed["weights"][:size]}
    if "covariance" in changed:
        changed = {"covariance": [[-1e9] * size] * size}
    stored(tmp_path).save({**good, **changed})
    guarded = _policy("speculation", tmp_path)
    state = RequestState("r", 10, 8, 0.0, prompt_token_ids=[1] * 10)
    guarded.call("enter", lambda policy: policy.enter(state), None)
    for number in range(60):
        lengths = guarded.call(
            "get_num_draft_tokens",
            lambda policy, n=number: policy.get_num_draft_tokens(UpcomingStep([state], 4, number=n)),
            None,
        )
        outcome = StepOutcome([state], lengths, [0], 1 + sum(lengths), 0.01, 1, number + 1, max(lengths))
        guarded.call("observe", lambda policy, outcome=outcome: policy.observe(outcome), None)
    assert not guarded.disabled


@pytest.mark.parametrize(
    "changed",
    [
        {"observed": 1e12},
        {"observed": "many"},
        {"scores": [1e14]},
        {"contexts": [[10**14, [1]]], "events": [[0.0]], "risk": [[0.0]]},
        {"contexts": [[1, [1]]], "events": [[1e14]], "risk": [[0.0]]},
        {"contexts": 7},
        {"edges": None},
    ],
)
def test_similarity_starts_with_any_lengths(tmp_path, changed):
    fresh = _policy("batching", tmp_path).instance
    state = json.loads(json.dumps(fresh._state()))
    bins = len(state["lengths"]["edges"])
    for name in ("events", "risk"):
        if name in changed:
            changed = {**changed, name: [row * bins for row in changed[name]]}
    if "scores" in changed:
        changed = {"scores": changed["scores"] * len(state["lengths"]["scores"])}
    state["lengths"].update(changed)
    fresh._store.save(state)
    guarded = _policy("batching", tmp_path)
    states = [RequestState(f"r{i}", 10, 8, 0.0, index=i, prompt_token_ids=[i] * 10) for i in range(2)]
    for each in states:
        guarded.call("enter", lambda policy, each=each: policy.enter(each), None)
    snapshot = SchedulerSnapshot(states, (), 1.0, 8, 1000)
    guarded.call("background_work", lambda policy: policy.background_work(snapshot), None)
    assert guarded.call("admit", lambda policy: policy.admit(snapshot), None) is not None
    assert not guarded.disabled
