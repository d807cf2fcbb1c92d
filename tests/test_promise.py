"""The benchmark of the promise, without a model: same prompts for all arms, rounds that add up, new servers."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
from fake_server import FakeServer, serving
from rich.console import Console

from vllm_instant.tools.measure.closed_loop import PromptSpec

pytestmark = pytest.mark.unit
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
promise = importlib.import_module("promise")
bench_models = importlib.import_module("bench_models")


@pytest.fixture
def started(monkeypatch):
    """Every server that is started, in order: a stand-in that keeps its requests."""
    servers = []

    class Started:
        def __init__(self, model, words, *, log, name):
            self.name, self.words, self.fake = name, words, FakeServer(step_seconds=0.002, step_tokens=2)
            self.serving = serving(self.fake)

        def launch(self):
            self.url = self.serving.__enter__()
            servers.append(self)

        def wait(self):
            pass

        def stop(self):
            self.serving.__exit__(None, None, None)

    monkeypatch.setattr(sys, "argv", [promise.__file__])
    monkeypatch.setattr(promise, "Server", Started)
    monkeypatch.setattr(promise, "settle", lambda: None)
    monkeypatch.setattr(promise, "stop_all", lambda *stopped: [server.stop() for server in stopped])
    return servers


def _measure(tmp_path, part, cells, rounds, fixed="suffix"):
    asked = {"mixed": lambda count, seed: [PromptSpec(f"{seed} {i}", ignore_eos=False) for i in range(count)]}
    model = bench_models.BenchModel("x", tmp_path, lambda: tmp_path, asked)
    options = argparse.Namespace(
        part=part, rounds=rounds, seconds=60, tokens=6, fixed=fixed, name="", output=tmp_path / "promise.json"
    )
    (tmp_path / "costs").mkdir(exist_ok=True)
    arms = promise.Arms(model, tmp_path, tmp_path / "costs")
    try:
        promise.measure(arms, model, cells, options, Console(quiet=True))
    finally:
        arms.stop()
    return [found for run in json.loads(options.output.read_text())["runs"] for found in run["measured"]]


def _prompts(server, skip=0):
    return [request["prompt"] for request in server.fake.requests][skip:]


def test_all_arms_get_the_same_prompts_and_rounds_add_up(started, tmp_path):
    cells = [promise.Cell("mixed", 4), promise.Cell("mixed", 1)]
    assert {len(found["rounds"]["ours"]) for found in _measure(tmp_path, "warm", cells, 1)} == {1}
    off, suffix, ours = started
    assert (off.name, suffix.name, ours.name) == ("off", "suffix", "ours")
    assert "--plugins" not in off.words
    assert sorted(_prompts(off)) == sorted(_prompts(ours))
    assert len(_prompts(off)) == 4 + 4 + 3  # one burst to warm up, one per cell
    lengths = [request.get("vllm_xargs", {}).get("instant_speculation") for request in suffix.fake.requests]
    assert (lengths.count(2), lengths.count(8)) == (11, 11)
    assert not any(request["ignore_eos"] for request in ours.fake.requests)

    again = _measure(tmp_path, "warm", cells, 2)
    assert {len(bursts) for found in again for bursts in found["rounds"].values()} == {2}
    assert {found["users"] for found in again} == {1, 4}
    for found in again:
        assert set(found["arms"]) == {"off", "suffix, K=2", "suffix, K=8", "ours"}
        assert set(found["ours"]["ours"]["best_by_round"]) <= {"off", "suffix, K=2", "suffix, K=8"}
        assert found["rounds"]["ours"][0]["tokens"] == 6 * max(found["users"], 3)
    assert not set(_prompts(started[3], skip=4)) & set(_prompts(off)), "each round has new prompts"


def test_cold_bursts_are_the_first_work_of_new_servers(started, tmp_path):
    [found] = _measure(tmp_path, "cold", [promise.Cell("mixed", 4)], 2)
    names = [server.name for server in started]
    assert (names.count("off"), names.count("ours"), names.count("suffix")) == (2, 2, 1)
    assert {len(server.fake.requests) for server in started if server.name != "suffix"} == {4}
    assert not (tmp_path / "costs").exists()
    assert len(found["rounds"]["ours"]) == 2


def _speeds(*values):
    return [{"tokens_per_second": value} for value in values]


def test_the_best_arm_of_a_round_is_chosen_by_the_other_rounds():
    lucky = {"off": _speeds(10, 30, 10), "suffix, K=2": _speeds(11, 11, 11), "ours": _speeds(99, 99, 99)}
    # In the second round "off" was fast by luck: in the other rounds that speaks for it, there it does not.
    assert promise.best_by_round("ours", lucky, {}) == ["off", "suffix, K=2", "off"]
    one = {arm: bursts[1:2] for arm, bursts in lucky.items()}
    assert promise.best_by_round("ours", one, {}) == ["off"]
    assert promise.best_by_round("ours", one, {arm: bursts[::2] for arm, bursts in lucky.items()}) == ["suffix, K=2"]


def test_new_servers_are_compared_with_the_best_arm_of_warm_ones(started, tmp_path):
    cell = promise.Cell("mixed", 4)
    _measure(tmp_path, "warm", [cell], 1)
    record = json.loads((tmp_path / "promise.json").read_text())
    for burst in record["runs"][0]["measured"][0]["rounds"]["suffix, K=8"]:
        burst["tokens_per_second"] = 1e9
    (tmp_path / "promise.json").write_text(json.dumps(record))
    found = {found["part"]: found for found in _measure(tmp_path, "cold", [cell], 1)}
    assert found["cold"]["ours"]["ours"]["best_by_round"] == ["suffix, K=8"]
    assert found["warm"]["rounds"]["suffix, K=8"][0]["tokens_per_second"] == 1e9


def test_first_tokens_are_compared_with_those_of_two_servers_of_vllm(started, tmp_path):
    [found] = _measure(tmp_path, "first", [promise.Cell("mixed", 1)], 3)
    assert [server.name for server in started] == ["off", "off again", "ours"]
    assert {request["max_tokens"] for server in started for request in server.fake.requests[4:]} == {1}
    assert set(found["ttft_to_off"]) == {"off again", "ours"}


def test_the_same_server_is_asked_with_and_without_drafts(started, tmp_path):
    [found] = _measure(tmp_path, "pinned", [promise.Cell("mixed", 2)], 2)
    assert [server.name for server in started] == ["off", "ours"]
    pins = [request.get("vllm_xargs") for request in started[1].fake.requests[8:]]
    assert pins.count({"instant_speculation": 0}) == pins.count(None) == 2 * 3
    assert found["ours"]["ours"]["best_by_round"] == ["off", "off"]
    assert set(found["rounds"]) == {"off", "ours, K=0", "ours"}


def test_each_of_our_arms_is_compared_with_drafts_that_it_has(started, tmp_path):
    [found] = _measure(tmp_path, "warm", [promise.Cell("mixed", 1)], 1, "suffix,draft model")
    assert found["part"] == "warm, draft model"
    assert [server.name for server in started] == ["off", "suffix", "draft model", "ours", "ours with the draft model"]
    deployments = {server.name: Path(server.words[-1]).read_text() for server in started if "--plugins" in server.words}
    assert 'plugin = "hybrid"' in deployments["ours with the draft model"]
    assert "model = " not in deployments["ours"]
    rounds = {arm: _speeds(1.0) for arm in found["rounds"]} | {"draft model, K=3": _speeds(9.0), "off": _speeds(2.0)}
    assert promise.best_by_round("ours", rounds, {}) == ["off"]
    assert promise.best_by_round("ours with the draft model", rounds, {}) == ["draft model, K=3"]
