import asyncio
import json
import time

import pytest
from fake_streaming import FakeEngine
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from streaming_app import APPEND, COMMIT, KEY, UPDATE, hear, serving

from vllm_instant.streaming.connections import ConnectionPolicy
from vllm_instant.streaming.routes import Streaming
from vllm_instant.streaming.tokens import SessionTokens


def test_a_prompt_is_typed_and_answered_over_a_websocket():
    with serving() as (client, _), client.websocket_connect("/v1/instant/session") as socket:
        assert hear(socket, "session.created")["session"]["text_characters"] == 1_000_000
        for event in (UPDATE, APPEND, COMMIT):
            socket.send_json(event)
        text = ""
        while (event := hear(socket, "response.chunk", "response.done"))["type"] == "response.chunk":
            text += event["chunk"]["choices"][0]["delta"]["content"]
        assert text.endswith(" tokens")
        assert event["status"] == "completed"
        assert event["first_token_seconds"] >= 0


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        ('{"type": "input_text.app', "the frame is not JSON"),
        (b"\xff\xfe", "the frame is not JSON"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ("7", "an event is a JSON object with a type; found 7"),
        ('{"type": "input_text.apend"}', "did you mean input_text.append"),
        ('{"type": ["x"]}', "there is no event type"),
        ('{"type": "input_text.append"}', "input_text.append: text: field required"),
        ('{"type": "input_text.append", "text": 7}', "text: input should be a valid string"),
        ('{"type": "input_text.append", "text": "\\ud83d"}', "half of a surrogate pair"),
        ('{"type": "input_text.replace", "start": 4, "text": "x"}', "the text has 0 characters"),
        ('{"type": "input_text.replace", "start": -1, "text": "x"}', "start: input should be greater"),
        ('{"type": "input_text.append", "text": "x", "txt": "y"}', "txt: extra inputs are not permitted"),
        ('{"type": "session.update", "session": {"messages": "hi"}}', "must be a list of chat messages"),
        ('{"type": "session.update", "session": {"model": "missing"}}', "does not exist"),
        ('{"type": "input_text.commit", "event_id": "e1"}', r"send session\.update first"),
    ],
)
def test_an_invalid_frame_is_an_error_event_and_the_session_continues(frame, told):
    import re

    with serving() as (client, _), client.websocket_connect("/v1/instant/session") as socket:
        if isinstance(frame, bytes):
            socket.send_bytes(frame)
        else:
            socket.send_text(frame)
        error = hear(socket, "error")["error"]
        assert re.search(told, error["message"])
        assert error["event_id"] == ("e1" if "e1" in str(frame) else None)
        for event in (UPDATE, APPEND, COMMIT):
            socket.send_json(event)
        assert hear(socket, "response.done")["status"] == "completed"


def test_a_closed_connection_releases_everything_at_once():
    engine = FakeEngine()
    engine.answer_gate.clear()
    with serving(engine) as (client, streaming):
        with client.websocket_connect("/v1/instant/session") as socket:
            for event in (UPDATE, APPEND, COMMIT):
                socket.send_json(event)
            hear(socket, "response.chunk")
            assert (streaming.manager.sessions, engine.open_answers) == (1, 1)
        deadline = time.monotonic() + 2
        while (streaming.manager.sessions, engine.open_answers) != (0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_limits_are_reported_and_released():
    with serving(tells_keys=True, max_sessions=3, max_sessions_per_client=2, max_text_characters=5) as (client, _):  # noqa: SIM117  too long
        with client.websocket_connect("/v1/instant/session") as first:
            hear(first, "session.created")
            first.send_json(APPEND)
            assert "at most 5 characters" in hear(first, "error")["error"]["message"]
            opened = client.post("/v1/instant/sessions")
            assert opened.status_code == 201
            refused = client.post("/v1/instant/sessions")
            assert refused.status_code == 429
            assert refused.json()["error"]["message"] == "this client's limit of 2 open sessions is reached"
            with client.websocket_connect("/v1/instant/session") as second:
                assert hear(second, "error")["error"]["code"] == "too_many_sessions"
                with pytest.raises(WebSocketDisconnect):
                    second.receive_json()
            other = {"Authorization": "Bearer another"}
            assert client.post("/v1/instant/sessions", headers=other).status_code == 201
            third = {"Authorization": "Bearer a third"}
            assert "limit of 3 open sessions" in client.post("/v1/instant/sessions", headers=third).text
            assert client.delete(f"/v1/instant/sessions/{opened.json()['id']}").status_code == 204
            assert client.post("/v1/instant/sessions").status_code == 201


def test_idle_sessions_end():
    with serving(idle_seconds=0.2) as (client, streaming):
        identity = client.post("/v1/instant/sessions", json={"model": "m"}).json()["id"]
        with client.websocket_connect("/v1/instant/session") as socket:
            assert hear(socket, "error")["error"]["code"] == "idle"
            with pytest.raises(WebSocketDisconnect):
                socket.receive_json()
        deadline = time.monotonic() + 30
        while streaming.manager.sessions:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert client.post(f"/v1/instant/sessions/{identity}", json=APPEND).status_code == 404


def test_an_answer_that_takes_long_does_not_make_a_session_idle():
    engine = FakeEngine()
    engine.answer_gate.clear()
    with serving(engine, idle_seconds=0.1) as (client, _), client.websocket_connect("/v1/instant/session") as socket:
        for event in (UPDATE, APPEND, COMMIT):
            socket.send_json(event)
        hear(socket, "response.chunk")
        time.sleep(0.3)
        client.portal.call(engine.answer_gate.set)
        assert hear(socket, "response.done", "error")["type"] == "response.done"


def test_the_same_over_plain_http():
    with serving() as (client, streaming):
        identity = client.post("/v1/instant/sessions", json={"model": "m"}).json()["id"]
        path = f"/v1/instant/sessions/{identity}"
        answer = client.post(path, json=[APPEND, {"type": "input_text.replace", "start": 4, "end": 6, "text": "was"}])
        assert answer.json()["id"] == identity
        lines = [line for line in client.post(path, json=COMMIT).text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert "".join(c["choices"][0]["delta"]["content"] for c in chunks).endswith(" tokens")
        for wrong, told in (
            ("{", "not JSON"),
            (json.dumps([COMMIT, APPEND]), "only the last event"),
            (json.dumps({"type": "x"}), "no event type"),
        ):
            refused = client.post(path, content=wrong, headers={"Content-Type": "application/json"})
            assert refused.status_code == 400
            assert told in refused.json()["error"]["message"]
        stranger = {"Authorization": "Bearer another"}
        streaming.policy = ConnectionPolicy(checks_keys=True)
        assert client.post(path, json=APPEND, headers=stranger).status_code == 404
        streaming.policy = ConnectionPolicy()
        assert client.delete(path).status_code == 204
        assert client.post(path, json=APPEND).status_code == 404


def test_a_request_that_fails_has_its_status_over_plain_http():
    with serving(FakeEngine(max_tokens=10)) as (client, _):
        assert client.post("/v1/instant/sessions", json={"model": "missing"}).status_code == 400
        identity = client.post("/v1/instant/sessions", json={"model": "m"}).json()["id"]
        answer = client.post(f"/v1/instant/sessions/{identity}", json=[APPEND, COMMIT])
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_failed")


def test_a_token_opens_sessions_and_nothing_else():
    now = [1000.0]
    with serving(with_key=True, clock=lambda: now[0], token_seconds=30.0) as (client, streaming):
        key = {"Authorization": f"Bearer {KEY}"}
        with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/v1/instant/session"):
            pass
        assert client.post("/v1/instant/tokens").status_code == 401
        token = client.post("/v1/instant/tokens", headers=key, json={"client": "ann"}).json()["token"]
        protocols = ["instant", f"instant-token.{token}"]
        with client.websocket_connect("/v1/instant/session", subprotocols=protocols) as socket:
            assert socket.accepted_subprotocol == "instant"
            hear(socket, "session.created")
            assert streaming.manager._clients == {"token ann": 1}
        bearer = {"Authorization": f"Bearer {token}"}
        opened = client.post("/v1/instant/sessions", headers=bearer)
        assert opened.status_code == 201
        assert (
            client.post(f"/v1/instant/sessions/{opened.json()['id']}", headers=bearer, json=APPEND).status_code == 200
        )
        assert client.post("/v1/instant/tokens", headers=bearer).status_code == 401
        for wrong in (token[:-2] + "AA", token + ".x", "ist-", "ist-é.é", SessionTokens().make("ann", 30)):
            header = {"Authorization": f"Bearer {wrong}".encode("latin-1")}
            assert client.post("/v1/instant/sessions", headers=header).status_code == 401
        now[0] += 31
        assert client.post("/v1/instant/sessions", headers=bearer).status_code == 401
        for wrong_body in ("[]", '{"client": 7}', '{"clent": "x"}', "{"):
            as_json = key | {"Content-Type": "application/json"}
            assert client.post("/v1/instant/tokens", headers=as_json, content=wrong_body).status_code == 400


def test_the_demo_page_is_served_only_if_it_is_enabled():
    with serving() as (client, _):
        assert client.get("/v1/instant/demo").status_code == 404
    with serving(with_key=True, demo_page=True) as (client, _):
        page = client.get("/v1/instant/demo")  # the page itself has no secret: it asks for the key
        assert page.status_code == 200
        assert "<textarea" in page.text


def test_no_session_opens_before_the_engine_is_ready():
    app = FastAPI()
    Streaming(SessionTokens()).attach(app)
    client = TestClient(app)
    assert client.post("/v1/instant/sessions").status_code == 503
    with client.websocket_connect("/v1/instant/session") as socket:
        assert hear(socket, "error")["error"]["code"] == "not_ready"


def test_a_slow_reader_slows_only_itself():
    """The server buffers a limited number of events for a client that does not read."""
    from vllm_instant.streaming.speculative_answer import MAX_BUFFERED_CHUNKS, SpeculativeAnswer

    class Endless(FakeEngine):
        made = 0

        async def answer(self, request, affinity, commit=None):
            while True:
                self.made += 1
                yield {"choices": []}

    async def run():
        engine = Endless()
        early = SpeculativeAnswer(engine, {}, 1)
        for _ in range(5 * MAX_BUFFERED_CHUNKS):
            await asyncio.sleep(0)
        assert engine.made <= MAX_BUFFERED_CHUNKS + 1
        await early.discard()

    asyncio.run(run())
