"""Every endpoint of vLLM's API server under a guard; the engine behind it generates given texts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "support" / "forced_endpoints.py"
DEPLOYMENT = """
[guard]
plugin = "rules"
words = ["bomb"]
message = " [filtered]"

[speculation]
plugin = "off"
"""
STOPPED = "first a  [filtered]"


@pytest.fixture(scope="module")
def answers(demo_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoints")
    (folder / "deploy.toml").write_text(DEPLOYMENT)
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    words = [str(demo_pair.target), str(folder / "deploy.toml"), str(folder / "chat.jinja")]
    command = [sys.executable, str(SCRIPT), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")), None)
    assert line is not None, done.stderr[-3000:]
    return json.loads(line.removeprefix("ANSWERS "))


def test_no_answer_has_the_word(answers):
    assert "bomb" not in json.dumps({name: found for name, found in answers.items() if name != "completion, echo"})


def test_completions(answers):
    (choice,) = answers["completion"]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (STOPPED, "content_filter")
    assert len(choice["token_ids"]) == len(choice["logprobs"]["tokens"]) == 2
    assert answers["completion"]["usage"]["completion_tokens"] == 2
    parts = [part["choices"][0] for part in answers["completion, streamed"]]
    assert "".join(part["text"] for part in parts) == STOPPED
    assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["content_filter"]
    assert answers["completion, echo"]["choices"][0]["text"] == f"def main():{STOPPED}"
    assert [choice["text"] for choice in answers["completions"]["choices"]] == [STOPPED] * 2


def test_chat(answers):
    (choice,) = answers["chat"]["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (STOPPED, "content_filter")
    assert [token["token"] for token in choice["logprobs"]["content"]] == ["first", " a"]
    parts = [part["choices"][0] for part in answers["chat, streamed"]]
    assert "".join(part["delta"].get("content") or "" for part in parts) == STOPPED
    assert parts[-1]["finish_reason"] == "content_filter"
    (clean,) = answers["clean"]["choices"]
    assert (clean["message"]["content"], clean["finish_reason"]) == ("a clean answer", "length")


def test_responses_and_messages(answers):
    found = answers["response"]
    assert found["output"][0]["content"][0]["text"] == STOPPED
    assert (found["status"], found["incomplete_details"]["reason"]) == ("incomplete", "content_filter")
    assert answers["response, streamed"][-1]["response"]["incomplete_details"]["reason"] == "content_filter"
    assert answers["message"]["content"][0]["text"] == STOPPED


def test_arguments_of_tool_calls(answers):
    assert answers["tool call"]["choices"][0]["finish_reason"] == "content_filter"
    parts = [part["choices"][0] for part in answers["tool call, streamed"]]
    calls = [call for part in parts for call in part["delta"].get("tool_calls") or ()]
    assert calls[0]["function"]["name"] == "f"
    assert parts[-1]["finish_reason"] == "content_filter"


def test_beam_search(answers):
    assert [choice["finish_reason"] for choice in answers["beam search"]["choices"]] == ["length"] * 2
    assert [choice["text"] for choice in answers["beam search, prompt"]["choices"]] == [" [filtered]"] * 2


def test_prompts(answers):
    (choice,) = answers["prompt"]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" [filtered]", "content_filter")
    assert answers["prompt, streamed"][-1]["choices"][0]["finish_reason"] == "content_filter"


def test_a_request_can_be_stricter_only(answers):
    assert answers["laxer"]["status"] == 400
    assert "less strict" in answers["laxer"]["error"]["message"]
    assert answers["stricter"]["status"] == 200


def test_the_engine_is_told_to_abort(answers):
    assert answers["aborted"] >= 1
