"""``vllm-instant loadtest capacity`` in this process; the probes are made in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mock_servers import serving
from typer.testing import CliRunner

from vllm_instant.tools.cli import app
from vllm_instant_loadtests.mock import MockPace

GOAL = ["--goal", "ttft_p95_ms=300"]


def capacity(*words):
    return CliRunner().invoke(app, ["loadtest", "capacity", *map(str, words)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give at least one --goal"),
        (["--goal", "ttft=3"], "--goal ttft=3 should be METRIC_pPERCENT_ms=MILLISECONDS"),
        ([*GOAL, "--attain", "2"], "--attain 2 should be a share between 0 and 1"),
        ([*GOAL, "--sweep", "1,x"], "--sweep 1,x should be rates, separated by commas"),
        ([*GOAL, "--precision", "0"], "--precision, --probe-seconds and --sweep should be above 0"),
        (["stedy", *GOAL], "stedy is neither a file nor a scenario"),
    ],
)
def test_a_search_that_cannot_be_made_is_one_sentence(words, message):
    done = capacity(*words, "--url", "http://127.0.0.1:9")
    assert done.exit_code == 2
    assert message in done.output
    assert done.output.count("\n") == 1


def test_the_command_without_capacity_still_takes_a_scenario():
    assert "capacity" not in CliRunner().invoke(app, ["loadtest", "stedy"]).output
    assert "draft-collapse" in CliRunner().invoke(app, ["loadtest", "--list"]).output
    assert "loadtest capacity" in CliRunner().invoke(app, ["loadtest", "--help"]).output


def test_a_sweep_of_two_servers_ends_with_a_comparison(tmp_path: Path):
    scenario = tmp_path / "s.toml"
    scenario.write_text(
        'title = "S"\nseconds = 5\n[[traffic]]\nkind = "a"\nprompts = "creative"\nrate = 20.0\nmax_tokens = 10\n'
    )
    with serving(MockPace(first_ms=10, step_ms=20, slots=2)) as slow, serving(MockPace(first_ms=10)) as fast:
        urls = ["--url", f"slow={slow.url}", "--url", f"fast={fast.url}"]
        words = [scenario, *GOAL, *urls, "--sweep", "5,80", "--probe-seconds", "1", "--output", tmp_path / "run"]
        done = capacity(*words)
        refused = capacity(scenario, "--goal", "ttft_p95_ms=400", *urls, "--output", tmp_path / "run")
    assert done.exit_code in (0, 1), done.output
    found = json.loads((tmp_path / "run/capacity.json").read_text())
    shares = {
        (server["server"], probe["rate"]): probe["counts"]["ttft_p95_ms"][0] / probe["requests"]
        for server in found["servers"]
        for probe in server["probes"]
    }
    assert shares["slow", 5.0] > 0.9 > shares["slow", 80.0]
    assert (tmp_path / "run/capacity.html").exists()
    assert "ended early" in done.output
    again = CliRunner().invoke(app, ["loadtest", "--analyse", str(tmp_path / "run")])
    assert again.output.splitlines()[-2:] == done.output.splitlines()[-2:]
    assert "has a run with another setup" in refused.output
