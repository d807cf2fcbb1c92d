"""``vllm-instant explain`` prints the words of whatever policy a server runs."""

import json

import httpx
import pytest
from typer.testing import CliRunner

from vllm_instant.tools.cli import app
from vllm_instant.tools.measure import server_info


@pytest.fixture
def explain(monkeypatch):
    """Run the command on an answer; ``explain.asked`` is the request that it sent."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    def run(answer, *words):
        def get(url, path, **given):
            run.asked = {"url": url + path, **given}
            if isinstance(answer, Exception):
                raise answer
            return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

        monkeypatch.setattr(server_info, "get", get)
        return CliRunner().invoke(app, ["explain", *words])

    return run


def _engines(*decisions):
    return {"engines": [{"engine": number, "decisions": of_engine} for number, of_engine in enumerate(decisions)]}


def test_the_table_has_the_headings_and_texts_of_the_policy(explain):
    decisions = [
        {"summary": {"step": "7", "mood": "wary"}, "explanation": "wary: drafts are tried one at a time"},
        {"summary": {"step": "8", "mood": "bold", "drafts": "4"}, "explanation": "bold: drafts are long"},
        {"summary": {"step": "9", "mood": "bold", "drafts": "5"}, "explanation": "bold: drafts are long"},
    ]
    result = explain(_engines(decisions))
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[:4] == [["step", "mood", "drafts"], ["7", "wary"], ["8", "bold", "4"], ["9", "bold", "5"]]
    assert result.output.splitlines()[4:] == ["bold: drafts are long", "wary: drafts are tried one at a time"]


def test_a_policy_without_a_summary_shows_its_own_keys(explain):
    result = explain(_engines([{"temperature": 0.5, "why": "too hot", "lengths": [4, 0]}]))
    assert [line.split() for line in result.output.splitlines()] == [
        ["temperature", "why", "lengths"],
        ["0.5", "too", "hot", "[4,", "0]"],
    ]


def test_several_engines_have_a_table_each(explain):
    result = explain(_engines([{"step": 1}], [], [{"step": 2}]))
    assert result.output.split() == ["engine", "0", "step", "1", "engine", "2", "step", "2"]


def test_json_is_what_the_server_answered(explain):
    answer = _engines([{"step": 1, "nested": {"a": None}}])
    assert json.loads(explain(answer, "--json").output) == answer


def test_words_become_parameters_of_the_question(explain):
    explain(
        _engines([]), "--last", "3", "--request", "chatcmpl-1", "--queue", "--api-key", "k", "--url", "http://s/v1/"
    )
    assert explain.asked["url"] == "http://s/v1/instant/decisions"
    assert explain.asked["params"] == {"last": 3, "request_id": "chatcmpl-1", "queue": True}
    assert explain.asked["headers"] == {"Authorization": "Bearer k"}


def _step(number, granted, tokens, milliseconds):
    outcome = {"tokens": tokens, "milliseconds": milliseconds, "prompt_tokens": 0}
    return {"step": number, "num_requests": 1, "draft_tokens": granted, "outcome": outcome}


STEPS = [_step(1, 0, 1, 10.0), _step(2, 0, 1, 10.0), _step(3, 4, 5, 20.0), _step(4, 0, 1, 10.0)]
SPEEDUP = "3 of these steps read no prompts, 2 of them had drafts: 1.75 times the tokens per second"


def test_steps_with_and_without_drafts_are_compared(explain):
    assert SPEEDUP in explain(_engines(STEPS)).output
    assert SPEEDUP not in explain(_engines(STEPS), "--request", "r").output
    assert SPEEDUP not in explain(_engines(STEPS), "--queue").output


def test_decisions_that_describe_no_step_are_left_out_of_the_comparison(explain):
    assert SPEEDUP in explain(_engines([{"note": "started"}, *STEPS, {"step": 9, "outcome": {}}])).output


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.ConnectError("refused"), "http://127.0.0.1:8000 does not answer (ConnectError: refused)"),
        (httpx.Response(401), "wants an API key: give --api-key or set VLLM_API_KEY"),
        (httpx.Response(404), "runs without vllm-instant: start it with --plugins vllm_instant"),
        (httpx.Response(500, text="oops"), "answers HTTP 500: oops"),
        (httpx.Response(200, text="<html>"), "is no vLLM server with vllm-instant"),
        (httpx.Response(200, json=["no"]), "is no vLLM server with vllm-instant"),
    ],
)
def test_a_server_that_does_not_explain_gets_one_sentence(explain, answer, message):
    result = explain(answer)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("code", ["\x1b[2J", "\x9b31m", "\x07", "\u202e"])
def test_a_server_cannot_command_the_terminal(explain, code):
    decision = {"summary": {f"head{code}": f"text{code}"}, "explanation": f"because{code}"}
    several = httpx.Response(200, json={"engines": [{"engine": f"0{code}", "decisions": [decision]}] * 2})
    for answer in (_engines([decision]), several, httpx.Response(500, text=f"oops{code}")):
        result = explain(answer)
        shown = result.output + result.stderr
        assert "because" in shown or "oops" in shown
        assert not any(letter in shown for letter in code if not letter.isprintable())


def test_nothing_decided_yet(explain):
    assert "The server has no decisions: its policy has decided nothing yet" in explain(_engines([])).output
    assert "no decision about request r:" in explain(_engines([]), "--request", "r").output


@pytest.mark.parametrize("slot", ["guard", "escalation"])
def test_decisions_of_other_slots_have_routes_of_their_own(explain, slot):
    result = explain(_engines([{"request_id": "r", "reason": "label"}]), f"--{slot}")
    assert explain.asked["url"].endswith(f"/v1/instant/{slot}")
    assert "label" in result.output
    nothing = explain(_engines([]), f"--{slot}").output
    assert f"its {slot} has decided nothing yet" in nothing
    refused = explain(httpx.Response(404, text=f"this server has no {slot}"), f"--{slot}")
    assert f"has no {slot}: choose a plugin in [{slot}] of its deployment file" in refused.stderr
