"""Streaming prompts on a real server: the demo's target in float32, with an API key and a chat template."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from asking import settled_metrics
from streaming_checks import abuse_part, identity_part
from streaming_harness import pieces, typed, typing
from typer.testing import CliRunner

from vllm_instant.streaming.client import StreamingError, StreamingSession
from vllm_instant.tools.cli import app
from vllm_instant.tools.measure.servers import Server
from vllm_instant_loadtests.run_recorder import RecordedRun

KEY = "a-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
DEPLOYMENT = """
[streaming]
plugin = "resumable"
held_sessions = 4
max_sessions_per_client = 64
demo_page = true
"""
HELD = "vllm_instant:streaming_held_sessions"
TEMPLATE = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}### assistant:\n"
GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def server(launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    with launch(DEPLOYMENT, "--api-key", KEY, "--chat-template", str(template)) as running:
        yield running


def session(server: Server, **request: Any) -> StreamingSession:
    return StreamingSession(server.url, api_key=KEY, **{**GREEDY, **request})


def whole(server: Server, text: str, **request: Any) -> list[dict[str, Any]]:
    """The choices of the same prompt sent whole; the cache_salt keeps it apart from the sessions' cached blocks."""
    body = {**GREEDY, "cache_salt": text[:20], **request}
    body["messages"] = [*request.get("messages", []), {"role": "user", "content": text}]
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=120)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def test_an_edited_prompt_is_answered_as_if_sent_whole(server: Server) -> None:
    found = asyncio.run(identity_part(server.url, count=12, key=KEY))
    assert found["identical"] == 12


@pytest.mark.parametrize(
    "options",
    [
        {"n": 2, "seed": 7, "temperature": 1.0},
        {"stop": ["\n"]},
        {"logprobs": True, "top_logprobs": 2},
        {"structured_outputs": {"regex": "[0-9]{5}"}},
        {"messages": [{"role": "system", "content": "Continue the program."}]},
    ],
    ids=["n and seed", "stop", "log-probabilities", "grammar", "system prompt"],
)
def test_a_commit_has_every_option_of_the_chat_endpoint(server: Server, options: dict[str, Any]) -> None:
    text = pieces(300, 1, 21)[0]

    async def run() -> list[dict[str, Any]]:
        async with session(server, **options) as typing_session:
            for start in range(0, len(text), 60):
                await typing_session.append(text[start : start + 60])
                await asyncio.sleep(0.03)
            return [chunk async for chunk in typing_session.commit()]

    chunks = [choice for chunk in asyncio.run(run()) for choice in chunk["choices"]]
    for expected in whole(server, text, **options):
        own = [choice for choice in chunks if choice["index"] == expected["index"]]
        assert "".join(choice["delta"].get("content") or "" for choice in own) == expected["message"]["content"]
        assert own[-1]["finish_reason"] == expected["finish_reason"]
        if expected["logprobs"]:
            tokens = [entry["token"] for choice in own for entry in (choice["logprobs"] or {}).get("content", [])]
            assert tokens == [entry["token"] for entry in expected["logprobs"]["content"]]


def test_prefilled_text_is_cached_and_not_counted_as_requests(server: Server) -> None:
    names = {
        "requests": "vllm:request_success_total",
        "first tokens": "vllm:time_to_first_token_seconds_count",
        "prompt tokens": "vllm:prompt_tokens_total",
        "chunks": "vllm_instant:streaming_prefill_requests_total",
        "chunk tokens": "vllm_instant:streaming_prefill_tokens_total",
        "hits": "vllm:prefix_cache_hits_total",
        "commits": "vllm_instant:streaming_time_to_first_token_seconds_count",
    }
    before = settled_metrics(server)
    text = pieces(1500, 1, 22)[0]

    async def run() -> int:
        async with session(server) as typing_session:
            for start in range(0, len(text), 40):
                await typing_session.append(text[start : start + 40])
                await asyncio.sleep(0.02)
            async for _ in typing_session.commit():
                pass
            return typing_session.prefilled_tokens

    read = asyncio.run(run())
    after = settled_metrics(server)
    grown = {what: after[name] - before.get(name, 0.0) for what, name in names.items()}
    assert grown["requests"] == grown["first tokens"] == grown["commits"] == 1
    assert grown["chunks"] > 3
    assert grown["chunk tokens"] >= read > 300
    assert grown["hits"] >= read // 32 * 32
    assert grown["prompt tokens"] < read + 150


def test_a_session_pins_its_prefix_to_the_last_token(server: Server) -> None:
    """The prefix cache alone would keep whole blocks of 32 tokens."""

    async def hits(extra: str) -> float:
        before = server.metrics()
        async with session(server, max_tokens=2) as typist:
            for word in (extra + "explain why the tests of a project are the first thing to read").split(" "):
                await typist.append(word + " ")
                await asyncio.sleep(0.03)
            await asyncio.sleep(0.3)
            assert server.metrics()[HELD] == before[HELD] + 1
            read_before = server.metrics()["vllm:prefix_cache_hits_total"]
            await typist.append("thoroughly")
            async for _ in typist.commit():
                pass
            return server.metrics()["vllm:prefix_cache_hits_total"] - read_before

    found = [asyncio.run(hits(extra)) for extra in ("Please ", "Kindly and shortly ")]
    assert all(tokens > 0 for tokens in found)
    assert any(tokens % 32 for tokens in found), found


def test_a_speculative_answer_starts_in_a_pause_and_counts_after_the_commit(server: Server) -> None:
    before = settled_metrics(server)
    # Without drafts the answer is incomplete at the time of the commit.
    request = {**GREEDY, "max_tokens": 200, "ignore_eos": True, "vllm_xargs": {"instant_speculation": "off"}}
    answer = asyncio.run(typed(server.url, [(0, 0, "Why is the sky blue?")], 0.1, 0.5, api_key=KEY, **request))
    assert answer.text == whole(server, "Why is the sky blue?", **request)[0]["message"]["content"]
    after = settled_metrics(server)
    assert after["vllm:request_success_total"] - before["vllm:request_success_total"] == 2
    used = "vllm_instant:streaming_early_answers_total"
    assert after[used] - before.get(used, 0.0) == 2, "one was begun and one was used"


def test_turns_follow_each_other_in_one_session(server: Server) -> None:
    async def run() -> list[str]:
        said = []
        async with session(server) as talking:
            for text in ("import os", "import re"):
                await talking.append(text)
                chunks = [chunk async for chunk in talking.commit()]
                said.append("".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]))
        return said

    first, second = asyncio.run(run())
    history = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": first}]
    assert second == whole(server, "import re", messages=history)[0]["message"]["content"]


def test_misbehaving_sessions_do_not_affect_other_requests(server: Server) -> None:
    found = asyncio.run(abuse_part(server, sessions=40, key=KEY))
    assert not found["errors_of_other_requests"]
    assert found["other_requests"]["during"] > 3
    assert found["idle_typists_answered"] == 8
    assert "1024" in found["beyond_the_length"]
    assert found["kv_cache_usage"]["after"] == found["kv_cache_usage"]["before"]
    assert found["sessions_left"] == found["requests_left"] == 0
    assert found["alive"]


def test_sessions_need_the_api_key_or_a_session_token(server: Server) -> None:
    address = f"ws{server.url.removeprefix('http')}/v1/instant/session"

    async def opened(**credentials: Any) -> str:
        async with websockets.connect(address, **credentials) as connection:
            return str(await connection.recv())

    with pytest.raises(websockets.InvalidStatus):
        asyncio.run(opened())
    assert httpx.post(f"{server.url}/v1/instant/tokens").status_code == 401
    token = httpx.post(f"{server.url}/v1/instant/tokens", headers=HEADERS).json()["token"]
    assert "session.created" in asyncio.run(opened(subprotocols=["instant", f"instant-token.{token}"]))
    with_token = {"Authorization": f"Bearer {token}"}
    assert httpx.get(f"{server.url}/v1/models", headers=with_token).status_code == 401
    assert httpx.get(f"{server.url}/v1/instant/deployment", headers=with_token).status_code == 401

    async def wrong() -> None:
        async with StreamingSession(server.url, api_key="wrong", **GREEDY):
            pass

    with pytest.raises(StreamingError, match="401: an API key is needed"):
        asyncio.run(wrong())


def test_the_same_over_plain_http(server: Server) -> None:
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
        identity = client.post("/v1/instant/sessions", json=GREEDY).json()["id"]
        text = pieces(400, 1, 23)[0]
        for start, end, new in typing(text, random.Random(3)):
            event = {"type": "input_text.replace", "start": start, "end": end, "text": new}
            assert client.post(f"/v1/instant/sessions/{identity}", json=event).status_code == 200
        lines = client.post(f"/v1/instant/sessions/{identity}", json={"type": "input_text.commit"}).text
        assert lines.endswith("data: [DONE]\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines.split("\n\n")[:-2]]
        said = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        assert said == whole(server, text)[0]["message"]["content"]
        assert client.delete(f"/v1/instant/sessions/{identity}").status_code == 204


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


SLOW_LINE = """
const Native = WebSocket;
window.WebSocket = class extends Native {
  set onmessage(hear) { super.onmessage = hear && ((message) => setTimeout(() => hear(message), 250)); }
};
"""


def test_the_demo_page_in_a_browser(server: Server) -> None:
    """The connection is so slow that the session reopens (the key's field loses the focus) during typing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        try:
            page = chromium.new_page()
            faults: list[str] = []
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.add_init_script(SLOW_LINE)
            page.goto(f"{server.url}/v1/instant/demo")
            playwright.expect(page.locator("#error")).to_have_text("the server wants its API key")
            page.fill("#tokens", "24")
            page.fill("#key", KEY)
            page.dispatch_event("#key", "change")
            playwright.expect(page.locator("#status")).to_have_text(re.compile("ready|read ahead"), timeout=10_000)
            text = "Explain 👩‍👩‍👧 families to me, please, and how they"
            page.locator("#prompt").press_sequentially(text + "xx", delay=10)
            for _ in range(2):
                page.keyboard.press("Backspace")
            page.keyboard.press("Enter")
            answer = page.locator("#answer")
            playwright.expect(page.locator("#time")).to_contain_text("first text after", timeout=10_000)
            expected = whole(server, text)[0]["message"]["content"]
            playwright.expect(answer).to_have_text(expected, timeout=10_000, use_inner_text=True)
            assert faults == []
        finally:
            chromium.close()


def test_the_dashboard_queries_exported_metrics(server: Server) -> None:
    exported = set()
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            parts = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            exported |= {name + part for part in parts}
    text = (Path(__file__).resolve().parents[2] / "examples/grafana/vllm-instant.json").read_text()
    asked = set(re.findall(r"\b(?:vllm|vllm_instant):\w+", text))
    assert len(asked) > 35
    assert asked - exported == set()


def test_a_load_test_measures_chats_completions_and_typists(server: Server, tmp_path: Path) -> None:
    traffic = '[[traffic]]\nkind = "{0}"\nprompts = "creative"\nroute = "{0}"\nrate = 1.5\nmax_tokens = [8, 16]\n'
    routes = ("chat", "completions", "typist")
    text = 'title = "Three routes"\nseconds = 6\n' + "".join(traffic.format(route) for route in routes)
    (tmp_path / "three.toml").write_text(text.replace('"typist"\nrate', '"typist"\ncharacters_per_second = 80\nrate'))
    words = ["--url", server.url, "--api-key", KEY, "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["loadtest", str(tmp_path / "three.toml"), *words])
    assert done.exit_code == 0, done.output
    run = RecordedRun.read(tmp_path / "run")
    assert {request.route for request in run.requests} == set(routes)
    for request in run.requests:
        assert request.error is None
        assert 8 <= request.tokens <= 16
        assert request.id
        assert 0 < request.ttft < 5
        assert (request.prompt_tokens or 0) > 10
    assert run.about["servers"][0]["instant"]
    assert run.samples[-1].values["vllm:generation_tokens_total"] > 0
    steps = [step.decision["step"] for step in run.steps]
    assert len(steps) > 10
    assert steps == sorted(set(steps))
    assert (tmp_path / "run" / "report.html").exists()


def test_the_log_has_no_errors_after_all_tests(server: Server) -> None:
    """Runs last, on the log of all tests in this file."""
    assert server.metrics()[HELD] == 0
    for fault in ("Exception in ASGI", "event of session", "answer of session", "prefills no further", "raised in"):
        assert fault not in server.log_text()
