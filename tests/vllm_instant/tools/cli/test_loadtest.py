"""``vllm-instant loadtest``, in this process; what it starts is a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from mock_servers import serving
from typer.testing import CliRunner

from vllm_instant.tools.cli import app
from vllm_instant.tools.demo import assets
from vllm_instant_loadtests.launcher import LoadTestError, scenario_servers
from vllm_instant_loadtests.mock import MockPace
from vllm_instant_loadtests.scenario import load, parse

SCENARIO = """
title = "Short"
seconds = 3

[[traffic]]
kind = "chat"
prompts = "creative"
rate = 6.0
max_tokens = 12

[goals]
error_rate = 0.0
ttft_p99_ms = 2000
"""


def run(*words):
    return CliRunner().invoke(app, ["loadtest", *map(str, words)])


def test_the_built_in_scenarios_are_listed():
    listed = run("--list")
    assert listed.exit_code == 0
    for name in ("steady", "draft-collapse", "typists"):
        assert any(line.startswith(name) for line in listed.output.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a SCENARIO: a file or one of --list"),
        (["stedy"], "stedy is neither a file nor a scenario: there are agent, assistant"),
        (["steady", "--url", "127.0.0.1:8000"], "127.0.0.1:8000 should be addresses, each with a name of its own"),
        (["steady", "--url", "http://a:1", "--url", "http://b:1"], "should be addresses, each with a name of its own"),
        (["steady", "--url", "a=http://a:1", "--set", "x.y=1"], "are for servers started here, not for --url"),
        (["--analyse", "nowhere"], "nowhere has no recorded run"),
        (["steady", "--analyse", "nowhere"], "takes no scenario (steady)"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(words, message):
    done = run(*words)
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "locust" else found(name))
    done = run("steady")
    assert done.exit_code == 2
    assert "loadtest needs Locust: pip install 'vllm-instant[loadtest]'" in done.output


def test_nothing_but_locusts_own_process_is_patched():
    modules = "vllm_instant.tools.cli, vllm_instant_loadtests.launcher, vllm_instant_loadtests.analysis"
    code = f"import {modules}, sys; print(sorted({{'locust', 'gevent'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_run_is_recorded_judged_and_judged_again(tmp_path: Path):
    (tmp_path / "short.toml").write_text(SCENARIO)
    output = tmp_path / "run"
    with serving(MockPace(first_ms=20, step_ms=10)) as server:
        done = run(tmp_path / "short.toml", "--url", f"mine={server.url}/v1", "--output", output)
    assert done.exit_code == 0, done.output
    assert "mine" in done.output
    about = json.loads((output / "run.json").read_text())
    assert about["finished"]
    assert [server["name"] for server in about["servers"]] == ["mine"]
    for name in ("report.html", "report.json", "junit.xml"):
        assert (output / name).stat().st_size > 100
    again = run(tmp_path / "short.toml", "--url", "mine=http://127.0.0.1:9", "--output", output)
    assert again.exit_code == 2
    assert "has a run already" in again.output
    about["goals"]["ttft_p99_ms"] = 1.0
    (output / "run.json").write_text(json.dumps(about))
    missed = run("--analyse", output)
    assert missed.exit_code == 1
    assert "ttft_p99_ms" in missed.output


def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path):
    done = run("steady", "--url", "a=http://127.0.0.1:9", "--output", tmp_path / "run")
    assert done.exit_code == 2
    assert done.output.strip() == "vllm-instant: http://127.0.0.1:9 is no running vLLM server"


@pytest.fixture
def small_demo(monkeypatch, demo_pair):
    monkeypatch.setattr(assets, "prepare", lambda: demo_pair)


@pytest.mark.usefixtures("small_demo")
def test_vllm_and_ours_are_started_with_the_same_engine_arguments(tmp_path: Path):
    servers, deployments = scenario_servers(load("draft-collapse"), "demo", None, [], tmp_path)
    baseline, plain, ours = servers["vllm"], servers["plain"], servers["ours"]
    assert baseline.model == plain.model == ours.model
    assert plain.arguments == baseline.arguments[: len(plain.arguments)]
    assert "--speculative-config" not in plain.arguments
    speculation = json.loads(baseline.arguments[baseline.arguments.index("--speculative-config") + 1])
    assert speculation["num_speculative_tokens"] == 6
    assert ours.arguments[:2] == ["--plugins", "vllm_instant"]
    assert any(word == f"--instant-set=drafter.model={speculation['model']}" for word in ours.arguments)
    assert [deployments[name]["instant"] for name in servers] == [False, False, True]
    words = baseline.arguments
    assert words[words.index("--max-num-seqs") + 1] == "8"  # of the demo's deployment file


def test_the_public_chat_model_has_its_own_deployment(tmp_path, monkeypatch):
    from vllm_instant.tools.demo import real_model, setups

    monkeypatch.setattr(real_model, "prepare", lambda: tmp_path / "smollm2")
    servers, deployments = scenario_servers(load("assistant"), "smollm2", None, [], tmp_path)
    assert {server.model for server in servers.values()} == {str(tmp_path / "smollm2")}
    assert str(setups.REAL_DEPLOYMENT) in servers["ours"].arguments
    assert deployments["ours"]["instant"] is True
    assert str(tmp_path) not in deployments["ours"]["deployment"]


@pytest.mark.usefixtures("small_demo")
def test_the_tiny_cache_is_the_scenarios(tmp_path: Path):
    servers, _ = scenario_servers(load("kv-squeeze"), "demo", None, [], tmp_path)
    words = servers["ours"].arguments
    assert words[words.index("--num-gpu-blocks-override") + 1] == "24"


def test_a_fixed_length_without_a_draft_model_is_one_sentence(tmp_path: Path):
    traffic = [{"kind": "a", "prompts": "code", "rate": 1}]
    servers = [{"name": "stock", "draft_tokens": 3}]
    scenario = parse({"title": "t", "seconds": 9, "traffic": traffic, "servers": servers}, Path("s.toml"))
    with pytest.raises(LoadTestError, match=r"the server 'stock' should have draft_tokens = 3, for which .*no draft"):
        scenario_servers(scenario, "some/model", None, [], tmp_path)
