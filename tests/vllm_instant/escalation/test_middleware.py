"""The escalation in front of an application, beside a real server on a local port."""

import asyncio
import json
import logging
from functools import wraps

import pytest
from closing_server import closing_server
from scripted_deep_server import Always, Ends, FakeEnd, answer, events

from vllm_instant.escalation.deep_server import FORWARDED
from vllm_instant.interfaces.escalation import Decision, Depth, Question

CHAT = {"model": "small", "messages": [{"role": "user", "content": "Why?"}]}
STREAM = {**CHAT, "stream": True}
BY, WHY = "x-instant-answered-by", "x-instant-escalation"


def run(test):
    @wraps(test)
    def started(*args, **kwargs):
        return asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    return started


@run
async def test_a_deep_answer_is_the_deep_servers_byte_by_byte(monkeypatch):
    monkeypatch.setenv("DEEP_API_KEY", "deep-secret")
    deep = FakeEnd("deep")
    async with deep.served() as url:
        ends = Ends(deep_url=f"{url}/v1/", deep_model="large")
        for path, body, expected in (
            ("/v1/chat/completions", {**CHAT, "n": 2, "tools": [{"type": "function"}]}, answer("deep", 2)),
            ("/v1/completions", {"model": "small", "prompt": "Why?"}, answer("deep")),
            ("/v1/chat/completions", STREAM, b"".join(events("deep", " said", " it"))),
        ):
            status, headers, content = await ends.post(
                body, path, {"authorization": "Bearer ours", "x-request-id": "r"}
            )
            assert (status, content) == (200, expected)
            assert (headers[BY], headers[WHY]) == ("deep", "always")
            assert deep.bodies[-1] == {**body, "model": "large"}
            assert deep.headers[-1]["authorization"] == "Bearer deep-secret"
            assert deep.headers[-1]["x-request-id"] == "r"
            assert FORWARDED in deep.headers[-1]
    assert not ends.here.bodies
    assert headers["content-type"].startswith("text/event-stream")
    assert ends.value("requests_total", plugin="tested", chosen="deep", answered_by="deep") == 3
    assert ends.value("tokens_total", answered_by="deep", kind="completion") == 6
    assert ends.value("answer_seconds_count", answered_by="deep") == 3


@run
async def test_a_fast_answer_is_this_servers_byte_by_byte():
    ends = Ends(Always(Depth.FAST), deep_url="http://127.0.0.1:9")
    for body, expected in (({**CHAT, "n": 2}, answer("here", 2)), (STREAM, b"".join(events("here")))):
        status, headers, content = await ends.post(body, headers={"authorization": "Bearer ours"})
        assert (status, content) == (200, expected)
        assert (headers[BY], headers[WHY]) == ("fast", "always")
        assert ends.here.contents[-1] == json.dumps(body).encode()
        assert ends.here.headers[-1]["authorization"] == "Bearer ours"
        assert ends.service.decisions(1)[0]["request_id"] == f"chatcmpl-{ends.here.headers[-1]['x-request-id']}"


@run
async def test_other_requests_pass_untouched():
    ends = Ends(deep_url="http://127.0.0.1:9")
    for body, path, headers in (
        (CHAT, "/v1/embeddings", None),
        (CHAT, "/v1/chat/completions", {FORWARDED: "1"}),
        (b"{no json", "/v1/chat/completions", None),
        (b"[1]", "/v1/chat/completions", None),
    ):
        status, found, content = await ends.post(body, path, headers)
        assert (status, content) == (200, answer("here"))
        assert BY not in found
        assert ends.here.contents[-1] == (body if isinstance(body, bytes) else json.dumps(body).encode())
    assert not ends.service.decisions(10)


@pytest.mark.parametrize(
    ("fault", "kind"), [("key", "wrong key"), ("context", "refused"), ("busy", "status 503"), ("slow", "slow")]
)
@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "streamed"])
@run
async def test_without_a_deep_answer_the_fast_one_comes_marked(fault, kind, body, caplog):
    deep = FakeEnd("deep", fault)
    async with deep.served() as url:
        seconds = 0.2 if fault == "slow" else 30.0
        ends = Ends(deep_url=url, first_byte_seconds=seconds, answer_seconds=seconds)
        status, headers, content = await ends.post(body)
    assert (status, content) == (200, b"".join(events("here")) if body.get("stream") else answer("here"))
    assert headers[BY] == "fast"
    assert headers[WHY] == f"deep server: {kind}; always"
    assert ends.value("deep_failures_total", kind=kind) == 1
    assert ends.value("requests_total", plugin="tested", chosen="deep", answered_by="fast") == 1
    found = ends.service.decisions(1)[0]
    assert (found["chosen"], found["answered_by"], found["failure"]) == ("deep", "fast", kind)
    assert [record.levelno for record in caplog.records if "deep server" in record.getMessage()] == [logging.WARNING]


@run
async def test_a_whole_answer_that_is_cut_off_is_given_again_by_this_server():
    async with FakeEnd("deep", "cut").served() as url:
        ends = Ends(deep_url=url)
        status, headers, content = await ends.post(CHAT)
    assert (status, content, headers[BY]) == (200, answer("here"), "fast")
    assert headers[WHY] == "deep server: cut; always"


@pytest.mark.parametrize("fault", ["cut", "silent", "unended"])
@run
async def test_a_stream_that_is_cut_off_keeps_what_was_read_and_says_so(fault):
    async with FakeEnd("deep", fault).served() as url:
        ends = Ends(deep_url=url, idle_seconds=0.2)
        status, headers, content = await ends.post(STREAM)
    parts = [part for part in content.decode().split("\n\n") if part]
    expected = events("deep", " said", " it")
    assert (status, headers[BY]) == (200, "deep")
    read = len(parts) - 2
    assert read >= 2 - (fault == "cut")  # what an aborted connection has not sent is not there
    assert parts[:read] == [part.decode().strip() for part in expected[:read]]
    assert json.loads(parts[-2].removeprefix("data: "))["error"]["code"] == 502
    assert parts[-1] == "data: [DONE]"
    assert not ends.here.bodies
    assert ends.value("deep_failures_total", kind="cut") == 1


@run
async def test_a_server_that_is_down_is_left_alone_and_tried_again(caplog):
    deep = FakeEnd("deep")
    async with deep.served() as url:
        pass
    ends = Ends(deep_url=url, max_failures=2, retry_seconds=10)
    for _ in range(2):
        assert (await ends.post(CHAT))[1][WHY] == "deep server: down; always"
    assert ends.value("deep_down") == 1
    port = int(url.rpartition(":")[2])
    asked = []

    async def count(reader, writer):
        asked.append(1)
        writer.close()

    server = await asyncio.start_server(count, "127.0.0.1", port)
    assert (await ends.post(CHAT))[1][WHY] == "deep server: down; always"
    assert not asked
    assert len([record for record in caplog.records if "deep server" in record.getMessage()]) == 2
    ends.now = 10.0
    assert (await ends.post(CHAT))[1][BY] == "fast"  # it answers nothing
    assert len(asked) == 1
    assert (await ends.post(CHAT))[1][BY] == "fast"
    assert len(asked) == 1
    server.close()
    await server.wait_closed()
    async with deep.served() as url:
        ends.service.deep._client.base_url = url
        ends.now = 20.0
        assert (await ends.post(CHAT))[1][BY] == "deep"
        assert (await ends.post(CHAT))[1][BY] == "deep"
    assert ends.value("deep_down") == 0


@run
async def test_a_pause_between_requests_is_no_failure():
    async with closing_server() as url:
        ends = Ends(deep_url=url)
        await ends.post(CHAT)
        await asyncio.sleep(1.1)
        assert (await ends.post(CHAT))[1][BY] == "deep"


@run
async def test_a_refused_request_does_not_count_against_the_server():
    async with FakeEnd("deep", "context").served() as url:
        ends = Ends(deep_url=url, max_failures=1)
        for _ in range(3):
            assert (await ends.post(CHAT))[1][WHY] == "deep server: refused; always"


@run
async def test_parts_arrive_while_the_deep_server_generates():
    deep = FakeEnd("deep")
    deep.gate.clear()
    async with deep.served() as url:
        ends = Ends(deep_url=url)
        messages = ends.messages(STREAM)
        assert (await anext(messages))["type"] == "http.response.start"
        assert (await anext(messages))["body"] == events("deep")[0]
        deep.gate.set()
        rest = b"".join([message["body"] async for message in messages])
    assert rest == b"".join(events("deep", " said", " it")[1:])


@run
async def test_a_client_that_leaves_ends_the_deep_answer():
    deep = FakeEnd("deep")
    deep.gate.clear()
    async with deep.served() as url:
        ends, left = Ends(deep_url=url), asyncio.Event()
        messages = ends.messages(STREAM, left=left)
        await anext(messages)
        await anext(messages)
        left.set()
        await asyncio.wait_for(deep.has_lost_client.wait(), 10)
        assert [message async for message in messages] == []


@run
async def test_requests_choose_unless_the_server_forbids_it():
    async with FakeEnd("deep").served() as url:
        ends = Ends(Always(Depth.FAST), deep_url=url)
        chosen = {**CHAT, "vllm_xargs": {"instant_escalation": "deep", "other": 1}}
        _, headers, _ = await ends.post(chosen)
        assert (headers[BY], headers[WHY]) == ("deep", "the client's choice")
        _, headers, _ = await ends.post({**CHAT, "vllm_xargs": {"instant_escalation": "auto"}})
        assert headers[BY] == "fast"
        assert "vllm_xargs" not in ends.here.bodies[-1]
        assert ends.here.bodies[-1]["model"] == "small"
        status, headers, content = await ends.post({**CHAT, "vllm_xargs": {"instant_escalation": "deeper"}})
        assert status == 400
        assert "must be one of fast, deep, auto, not 'deeper'" in json.loads(content)["error"]["message"]
        strict = Ends(Always(Depth.FAST), deep_url=url, client_choice=False)
        status, _, content = await strict.post(chosen)
        assert status == 400
        assert "does not let requests choose" in json.loads(content)["error"]["message"]


@run
async def test_a_conversation_stays_deep_and_only_that_one():
    async with FakeEnd("deep").served() as url:
        ends = Ends(Always(Depth.FAST), deep_url=url)
        first = {**CHAT, "vllm_xargs": {"instant_escalation": "deep"}}
        assert (await ends.post(first))[1][BY] == "deep"
        said = {"role": "assistant", "content": "deep"}
        later = {**CHAT, "messages": [*CHAT["messages"], said, {"role": "user", "content": "And?"}]}
        _, headers, _ = await ends.post(later)
        assert (headers[BY], headers[WHY]) == ("deep", "the conversation is deep")
        calls = {**CHAT, "messages": [*CHAT["messages"], said, {"role": "tool", "content": "42"}]}
        assert (await ends.post(calls))[1][BY] == "deep"
        assert (await ends.post(later, headers={"authorization": "Bearer another"}))[1][BY] == "fast"
        other = {**CHAT, "messages": [{"role": "user", "content": "Hm?"}, said, {"role": "user", "content": "And?"}]}
        assert (await ends.post(other))[1][BY] == "fast"
        assert (await ends.post({**later, "vllm_xargs": {"instant_escalation": "fast"}}))[1][BY] == "fast"
        loose = Ends(Always(Depth.FAST), deep_url=url, sticky=False)
        await loose.post(first)
        assert (await loose.post(later))[1][BY] == "fast"


@run
async def test_a_conversation_whose_deep_server_failed_is_not_deep():
    async with FakeEnd("deep", "busy").served() as url:
        ends = Ends(Always(Depth.FAST), deep_url=url)
        await ends.post({**CHAT, "vllm_xargs": {"instant_escalation": "deep"}})
        assert not ends.service.conversations._deep


@run
async def test_this_server_can_be_both_ends():
    settings = {"thinking_token_budget": 64, "chat_template_kwargs": {"enable_thinking": True, "a": 1}}
    ends = Ends(deep_settings=settings, fast_settings={"temperature": 0.2})
    _, headers, content = await ends.post({**CHAT, "chat_template_kwargs": {"a": 2}})
    assert (headers[BY], content) == ("deep", answer("here"))
    expected = {**CHAT, "thinking_token_budget": 64, "chat_template_kwargs": {"enable_thinking": True, "a": 2}}
    assert ends.here.bodies[-1] == expected
    await ends.post({**CHAT, "vllm_xargs": {"instant_escalation": "fast"}})
    assert ends.here.bodies[-1] == {**CHAT, "temperature": 0.2}


class Asking(Always):
    def __init__(self, question):
        self.question, self.answers = question, []

    def decide(self, request, answer):
        if answer is None:
            return self.question
        self.answers.append(answer)
        return Decision(Depth.DEEP, "asked", 0.75)


@run
async def test_a_plugin_can_ask_this_server():
    plugin = Asking(Question({"model": "small", "prompt": "?", "stream": True}))
    ends = Ends(plugin, deep_settings={"seed": 1})
    ends.here.next_answers.append({"choices": [1]})
    _, headers, _ = await ends.post(CHAT, headers={"x-request-id": "abc"})
    assert plugin.answers == [{"choices": [1]}]
    assert ends.here.bodies[0] == {"model": "small", "prompt": "?", "stream": False}
    assert ends.here.headers[0]["x-request-id"] == "abc-escalation"
    assert headers[WHY] == "asked; probability 0.75"
    assert ends.service.decisions(1)[0]["probability"] == 0.75


@run
async def test_a_question_that_is_not_answered_in_time_has_no_answer():
    plugin = Asking(Question({}, timeout_seconds=0.05))
    ends = Ends(plugin, deep_settings={"seed": 1})
    here = ends.app._app

    async def stuck(scope, receive, send):
        if dict(scope["headers"])[b"x-request-id"].endswith(b"-escalation"):
            await asyncio.Event().wait()
        await here(scope, receive, send)

    ends.app._app = stuck
    assert (await ends.post(CHAT))[0] == 200
    assert plugin.answers == [{}]


@pytest.mark.parametrize("found", [None, Decision("deepest", "x"), Decision(Depth.DEEP, "x", 1.5), Question("?")])
@run
async def test_a_plugin_that_breaks_its_interface_is_switched_off(found):
    class Broken(Always):
        def decide(self, request, answer):
            return found

    ends = Ends(Broken(), deep_settings={"seed": 1})
    for _ in range(2):
        _, headers, content = await ends.post(CHAT)
        assert (headers[BY], headers[WHY], content) == ("fast", "the plugin has failed", answer("here"))
    assert ends.service.guarded.disabled


@run
async def test_reasons_are_safe_in_headers():
    class Rude(Always):
        def decide(self, request, answer):
            return Decision(Depth.FAST, "ä\r\nx-evil: 1" + "y" * 500)

    ends = Ends(Rude(), deep_settings={"seed": 1})
    _, headers, _ = await ends.post(CHAT)
    assert headers[WHY].startswith("???x-evil: 1yyy")
    assert len(headers[WHY]) == 100
    assert "x-evil" not in headers


def choices(*given):
    """An event, or a whole answer, with these choices."""
    return {"choices": [{"index": number, **one} for number, one in enumerate(given)]}


def event(*given):
    return b"data: " + json.dumps(choices(*given)).encode() + b"\n\n"


ROLE = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
WORD = {"delta": {"content": "Well"}, "finish_reason": None}
STOP = {"delta": {"content": "I must not."}, "finish_reason": "content_filter"}
ENDED = {"delta": {}, "finish_reason": "stop"}
DONE = b"data: [DONE]\n\n"
FILTERED = {"message": {"content": "Well, I must not."}, "finish_reason": "content_filter"}


@run
async def test_what_the_guard_stops_unread_is_answered_by_the_deep_end():
    deep = FakeEnd("deep")
    async with deep.served() as url:
        ends = Ends(Always(Depth.FAST), deep_url=url, escalate_stopped=True)
        ends.here.next_answers = [choices(FILTERED)]
        _, headers, content = await ends.post(CHAT)
        assert (headers[BY], headers[WHY]) == ("deep", "the guard stopped the fast answer")
        assert content == answer("deep")
        ends.here.next_streams = [[event(ROLE), event(STOP)[:20], event(STOP)[20:], DONE]]
        _, headers, content = await ends.post(STREAM)
        assert headers[BY] == "deep"
        assert content == b"".join(events("deep", " said", " it"))
        usage = b'data: {"choices": [], "usage": {"completion_tokens": 0}}\n\n'
        ends.here.next_streams = [[usage, DONE]]
        assert (await ends.post(STREAM))[1][BY] == "deep"
        text = {"text": "", "finish_reason": "content_filter"}
        ends.here.next_streams = [[event(text) + DONE]]
        assert (await ends.post({"prompt": "Why?", "stream": True}, "/v1/completions"))[1][BY] == "deep"
    assert ends.value("requests_total", plugin="tested", chosen="deep", answered_by="deep") == 4
    assert [one["reason"] for one in ends.service.decisions(4)] == ["the guard stopped the fast answer"] * 4


@pytest.mark.parametrize(
    "parts",
    [
        [event(ROLE), event(WORD), event(STOP), DONE],
        [event(ROLE, ROLE), event(STOP, WORD), event({**ROLE}, STOP), DONE],
        [event(ROLE), event({"delta": {"tool_calls": [{"index": 0}]}, "finish_reason": None}), event(STOP), DONE],
        [event(ROLE), event(ENDED), DONE],
        [b'data: {"error": {"message": "no"}}\n\n', DONE],
        [event(ROLE), event(STOP), b'data: {"error": {"message": "no"}}\n\n', DONE],
        [event(ROLE)],
        [event(ROLE), event(STOP)],
        [],
    ],
    ids=["read", "one of two", "tool", "empty", "error", "late error", "cut", "cut after the stop", "nothing"],
)
@run
async def test_a_stream_with_something_to_read_stays_as_it_is(parts):
    ends = Ends(Always(Depth.FAST), deep_url="http://127.0.0.1:9", escalate_stopped=True)
    ends.here.next_streams = [parts]
    _, headers, content = await ends.post(STREAM)
    assert (headers[BY], headers[WHY]) == ("fast", "always")
    assert content == b"".join(parts)


@run
async def test_a_stream_passes_from_its_first_word_on():
    ends = Ends(Always(Depth.FAST), deep_url="http://127.0.0.1:9", escalate_stopped=True)
    ends.here.next_streams = [[event(ROLE), event(WORD), event(WORD), event(ENDED), DONE]]
    bodies = [m["body"] async for m in ends.messages(STREAM) if m["type"] == "http.response.body" and m["body"]]
    assert bodies == [event(ROLE), event(WORD), event(WORD), event(ENDED), DONE]


@run
async def test_without_the_deep_end_the_stopped_answer_is_given():
    ends = Ends(Always(Depth.FAST), deep_url="http://127.0.0.1:9", escalate_stopped=True)
    ends.here.next_streams = [[event(ROLE), event(STOP), DONE]]
    _, headers, content = await ends.post(STREAM)
    assert content == event(ROLE) + event(STOP) + DONE
    assert (headers[BY], headers[WHY]) == ("fast", "deep server: down; the guard stopped the fast answer")
    ends = Ends(Always(Depth.FAST), deep_url="http://127.0.0.1:9")
    ends.here.next_answers = [choices(FILTERED)]
    _, headers, content = await ends.post(CHAT)
    assert json.loads(content) == choices(FILTERED)
    assert headers[WHY] == "always"


@run
async def test_this_server_answers_deep_what_its_guard_stopped():
    ends = Ends(Always(Depth.FAST), deep_settings={"temperature": 0}, escalate_stopped=True)
    ends.here.next_answers = [choices(FILTERED)]
    _, headers, content = await ends.post(CHAT)
    assert content == answer("here")
    assert headers[BY] == "deep"
    assert ends.here.bodies == [CHAT, {**CHAT, "temperature": 0}]
