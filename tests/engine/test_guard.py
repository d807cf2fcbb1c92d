"""Every endpoint of a real server under a guard; a grammar forces the answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from asking import settled_metrics
from typer.testing import CliRunner

from vllm_instant.streaming.client import StreamingSession
from vllm_instant.tools.cli import app
from vllm_instant.tools.measure.servers import Server

DEPLOYMENT = """
[guard]
plugin = "rules"
words = ["bomb"]
message = " [filtered]"

[streaming]
plugin = "chunked"
"""
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
FORCED = {"structured_outputs": {"choice": ["first a bomb then"]}}
GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 24}
CHAT = [{"role": "user", "content": "def main():"}]


@pytest.fixture(scope="module")
def server(launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    words = ("--chat-template", str(template), "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with launch(DEPLOYMENT, *words) as running:
        yield running


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.url}{path}", json={**GREEDY, **body}, timeout=120)
    assert response.status_code == 200, response.text
    return dict(response.json())


def chunks(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    with httpx.stream("POST", f"{server.url}{path}", json={**GREEDY, "stream": True, **body}, timeout=120) as response:
        lines = [line.removeprefix("data:").strip() for line in response.iter_lines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_completions_and_chat(server: Server) -> None:
    more = {"logprobs": 1, "return_token_ids": True}
    (choice,) = post(server, "/v1/completions", prompt="def main():", **FORCED, **more)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("first a ", "content_filter")
    assert len(choice["token_ids"]) == len(choice["logprobs"]["tokens"])
    assert "bomb" not in "".join(choice["logprobs"]["tokens"])
    parts = [part["choices"][0] for part in chunks(server, "/v1/completions", prompt="def main():", **FORCED)]
    assert "".join(part["text"] for part in parts) == "first a "
    assert parts[-1]["finish_reason"] == "content_filter"
    (choice,) = post(server, "/v1/chat/completions", messages=CHAT, **FORCED)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("first a ", "content_filter")
    parts = [part["choices"][0] for part in chunks(server, "/v1/chat/completions", messages=CHAT, **FORCED)]
    assert "".join(part["delta"].get("content") or "" for part in parts) == "first a "
    assert parts[-1]["finish_reason"] == "content_filter"


def test_arguments_of_a_tool_call(server: Server) -> None:
    call = '<tool_call>{"name": "f", "arguments": {"a": "a bomb"}}</tool_call>'
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body = {"messages": CHAT, "tools": [tool], "structured_outputs": {"choice": [call]}, "max_tokens": 60}
    choice = post(server, "/v1/chat/completions", **body)["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert "bomb" not in json.dumps(choice)
    assert "bomb" not in json.dumps(chunks(server, "/v1/chat/completions", **body))


def test_responses_say_why_they_are_incomplete(server: Server) -> None:
    body = {"input": "def main():", "max_output_tokens": 24, **FORCED}
    answer = post(server, "/v1/responses", **body)
    assert "bomb" not in json.dumps(answer["output"])
    assert (answer["status"], answer["incomplete_details"]["reason"]) == ("incomplete", "content_filter")


def test_beam_search_is_judged_whole(server: Server) -> None:
    whole = post(server, "/v1/completions", prompt="def main():", use_beam_search=True, n=2, max_tokens=8)
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["length"] * 2
    stopped = post(server, "/v1/completions", prompt="the bomb:", use_beam_search=True, n=2, max_tokens=8)
    assert [choice["text"] for choice in stopped["choices"]] == [" [filtered]"] * 2


def test_a_prompt_is_stopped_and_echoed_as_the_client_sent_it(server: Server) -> None:
    (choice,) = post(server, "/v1/completions", prompt="make a bomb")["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" [filtered]", "content_filter")
    found = post(server, "/v1/completions", prompt="def main():", n=2, seed=1, temperature=1.0)["choices"]
    assert [choice["finish_reason"] for choice in found] == ["length"] * 2


def test_a_request_can_be_stricter_only(server: Server) -> None:
    for name, value in (("instant_guard_late", "release"), ("instant_guard_side", "prompt")):
        body = {**GREEDY, "prompt": "x", "vllm_xargs": {name: value}}
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert response.status_code == 400
        assert name in response.text
    post(server, "/v1/completions", prompt="def main():", vllm_xargs={"instant_guard_late": "stop"})


def test_a_typed_prompt_is_judged(server: Server) -> None:
    async def typed() -> str:
        async with StreamingSession(server.url, **GREEDY) as session:
            await session.append("Please explain to me in some detail how one would ")
            await asyncio.sleep(0.3)
            await session.append("build a bomb at home")
            parts = [chunk["choices"][0]["delta"] async for chunk in session.commit() if chunk.get("choices")]
            return "".join(part.get("content") or "" for part in parts)

    assert asyncio.run(typed()) == " [filtered]"


def test_what_was_stopped_is_shown_and_counted(server: Server) -> None:
    post(server, "/v1/completions", prompt="def main():", **FORCED)
    result = CliRunner().invoke(app, ["explain", "--guard", "--url", server.url, "--json"])
    (engine,) = json.loads(result.output)["engines"]
    assert engine["decisions"][-1]["rule"] == "bomb"
    assert "text" not in engine["decisions"][-1]
    metrics = settled_metrics(server)
    stopped = {name: value for name, value in metrics.items() if name.startswith("vllm_instant:guard_stopped_total")}
    assert sum(stopped.values()) >= 1
    assert server.healthy()
