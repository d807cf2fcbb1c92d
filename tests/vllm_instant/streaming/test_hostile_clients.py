"""What clients of streaming sessions cannot do to a server and to each other."""

import asyncio
import json
import time

import pytest
from fake_streaming import Eager, FakeEngine, hosting
from starlette.websockets import WebSocketDisconnect
from streaming_app import APPEND, COMMIT, KEY, UPDATE, hear, serving

from vllm_instant.interfaces.streaming import PinLimits
from vllm_instant.streaming import budgets, prefill_ahead, routes, session, tokens
from vllm_instant.streaming.budgets import RenderingBudget
from vllm_instant.streaming.events import EventError, check, loads
from vllm_instant.streaming.session import Session
from vllm_instant.streaming.tokens import SessionTokens, TooManyTokensError

OPEN = "/v1/instant/sessions"


def opened(client, **named):
    return f"{OPEN}/{client.post(OPEN, json={'model': 'm'}, **named).json()['id']}"


def test_a_long_list_of_events_is_refused_and_none_of_it_has_an_effect():
    edit = {"type": "input_text.replace", "start": 0, "text": "x"}
    with serving() as (client, _):
        path = opened(client)
        refused = client.post(path, json=[edit] * (routes.MAX_LISTED_EVENTS + 1))
        assert (refused.status_code, "at most 256 events" in refused.text) == (413, True)
        half = client.post(path, json=[APPEND, {"type": "input_text.append", "text": 7}])
        assert half.status_code == 400
        # The text is still empty, so that a replacement at 1 is outside of it.
        assert client.post(path, json={**edit, "start": 1}).status_code == 400


def test_other_connections_have_their_turn_between_the_events_of_a_list():
    """The event loop runs other callbacks at least once per event, for a list in one body and for frames in a row."""

    async def run():
        turns = 0

        async def others():
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        streaming = routes.Streaming(SessionTokens())
        body = json.dumps([APPEND] * 100).encode()
        frames = [{"type": "websocket.receive", "text": json.dumps(APPEND)}] * 100

        async def body_of_one_piece():
            return {"type": "http.request", "body": body}

        async def frame():
            return frames.pop() if frames else {"type": "websocket.disconnect"}

        async def ignore(*_):
            pass

        with hosting(FakeEngine(), Eager()) as manager:
            streaming.start(manager)
            http = routes.HttpSession(manager, manager.enter("me"), "address 1.1.1.1")
            streaming._http["s"] = http
            scope = {"type": "http", "headers": [(b"content-type", b"application/json")], "client": ("1.1.1.1", 1)}
            task = asyncio.create_task(others())
            await asyncio.sleep(0)
            response = await streaming.handle(routes.Request(scope, body_of_one_piece), "s")
            assert response.status_code == 200
            assert turns >= 100
            turns = 0
            socket = routes.WebSocket({"type": "websocket", "headers": []}, frame, ignore)
            socket.client_state = socket.client_state.CONNECTED
            await streaming._follow(socket, http.session, manager, ignore)
            assert turns >= 100
            task.cancel()
            await http.session.close()
            streaming._reaper.cancel()

    asyncio.run(run())


def test_bodies_and_frames_are_limited_in_bytes():
    with serving(max_event_bytes=1000) as (client, _):
        path = opened(client)
        long = {"type": "input_text.append", "text": "x" * 1000}
        for target in (path, OPEN, "/v1/instant/tokens"):
            assert client.post(target, json=long).status_code == 413
        with client.websocket_connect("/v1/instant/session") as socket:
            socket.send_json(long)
            assert hear(socket, "error")["error"]["code"] == "too_large"
            socket.send_json(APPEND)
            socket.send_json(UPDATE)
            assert hear(socket, "session.updated", "error")["type"] == "session.updated"


def test_the_memory_of_a_clients_sessions_is_limited_and_given_back():
    with serving(max_client_bytes=10_000, max_total_bytes=15_000, max_event_bytes=100_000) as (client, _):
        first, second = opened(client), opened(client)
        text = {"type": "input_text.append", "text": "x" * 6000}
        assert client.post(first, json=text).status_code == 200
        assert client.post(second, json=text).status_code == 429
        update = {"type": "session.update", "session": {"model": "m", "unknown": ["y" * 6000]}}
        assert client.post(second, json=update).status_code == 429
        # The refused text had no effect: a replacement behind the beginning is outside.
        assert client.post(second, json={"type": "input_text.replace", "start": 1}).status_code == 400
        assert client.delete(first).status_code == 204
        assert client.post(second, json=text).status_code == 200


def test_all_clients_together_have_a_limit_of_bytes():
    with hosting(FakeEngine(), Eager(max_client_bytes=100, max_total_bytes=150)) as manager:
        one, other = manager.enter("one"), manager.enter("other")
        manager.resize(one, 90)
        with pytest.raises(routes.RefusedError, match="the server's limit of 150 bytes"):
            manager.resize(other, 70)
        manager.resize(one, 10)
        manager.resize(other, 70)
        manager.leave(one)
        manager.leave(other)
        manager.resize(manager.enter("one"), 100)


def test_a_request_of_very_many_small_values_is_refused():
    with serving(max_event_bytes=1 << 20) as (client, _):
        update = {"type": "session.update", "session": {"model": "m", "stop": [[]] * session.MAX_VALUES}}
        assert client.post(opened(client), json=update).status_code == 413


@pytest.mark.parametrize("path", [OPEN, "SESSION", "/v1/instant/tokens"])
@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "{", '"\\ud800"', b"\xff\xfe"])
def test_any_body_is_answered_with_a_refusal(path, text):
    with serving() as (client, _):
        target = opened(client) if path == "SESSION" else path
        refused = client.post(target, content=text, headers={"Content-Type": "application/json"})
        assert refused.status_code == 400


def test_half_of_a_surrogate_pair_is_found_in_text_and_bytes():
    for text in ('{"a": "\\uD83d"}', b'{"a": "\\ud83d"}'):
        with pytest.raises(EventError, match="surrogate"):
            loads(text, "frame")
    assert loads('{"a": "\\ud83d\\ude42"}', "frame") == {"a": "🙂"}
    assert loads('"\\\\ud"', "frame") == "\\ud"


# ------------------------------------------------------------------------------------------------- who is a client


def test_another_spelling_of_the_header_makes_no_other_client():
    with serving(with_key=True, max_sessions_per_client=1) as (client, _):
        assert client.post(OPEN, headers={"Authorization": f"Bearer {KEY}"}).status_code == 201
        for scheme in ("bearer", "BEARER", "bEaReR"):
            # The test's check of keys accepts one spelling; vLLM's accepts these.
            scope = {"type": "http", "headers": [(b"authorization", f"{scheme} {KEY}".encode())], "client": None}
            of = routes.ConnectionPolicy(checks_keys=True).client_of
            assert of(routes.HTTPConnection(scope)) == of(
                routes.HTTPConnection({**scope, "headers": [(b"authorization", f"Bearer {KEY}".encode())]})
            )
        assert client.post(OPEN, headers={"Authorization": f"Bearer {KEY}"}).status_code == 429


def test_without_keys_a_client_is_an_address_whatever_it_sends():
    with serving(max_sessions_per_client=2) as (client, _):
        for number in range(2):
            assert client.post(OPEN, headers={"Authorization": f"Bearer {number}"}).status_code == 201
        assert client.post(OPEN, headers={"Authorization": "Bearer 3"}).status_code == 429


# ------------------------------------------------------------------------------------------------- web pages


@pytest.mark.parametrize(
    ("origin", "host", "server", "allowed", "status"),
    [
        ("https://evil.example", "127.0.0.1:8000", "127.0.0.1", (), 403),
        ("null", "127.0.0.1:8000", "127.0.0.1", (), 403),
        ("http://evil.example", "evil.example", "127.0.0.1", (), 403),  # DNS that points to this machine
        ("http://evil.example", "evil.example", "::1", (), 403),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", "127.0.0.1", (), 201),
        ("http://localhost:8000", "LOCALHOST:8000", "127.0.0.1", (), 201),
        ("http://[::1]:8000", "[::1]:8000", "::1", (), 201),
        ("http://gpu:8000", "gpu:8000", "10.0.0.7", (), 201),
        ("http://gpu:9000", "gpu:8000", "10.0.0.7", (), 403),
        ("https://app.example", "127.0.0.1:8000", "127.0.0.1", ("https://app.example",), 201),
        ("https://evil.example", "127.0.0.1:8000", "127.0.0.1", ("*",), 201),
        (None, "anything", "127.0.0.1", (), 201),
    ],
)
def test_pages_of_other_origins_open_no_session_of_a_server_without_keys(origin, host, server, allowed, status):
    headers = {"Host": host} | ({"Origin": origin} if origin is not None else {})
    with serving(origins=allowed) as (client, _):
        app = client.app

        async def at(scope, receive, send):
            await app({**scope, "server": (server, 8000)} if "server" in scope else scope, receive, send)

        client.app = at
        client._transport.app = at
        assert client.post(OPEN, headers=headers).status_code == status
        if status == 201:
            with client.websocket_connect("/v1/instant/session", headers=headers) as socket:
                hear(socket, "session.created")
        else:
            assert client.post("/v1/instant/tokens", headers=headers).status_code == 403
            with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/instant/session", headers=headers):
                pass


def test_a_page_with_a_token_may_come_from_any_origin():
    with serving(with_key=True) as (client, _):
        key = {"Authorization": f"Bearer {KEY}"}
        token = client.post("/v1/instant/tokens", headers=key).json()["token"]
        protocols = ["instant", f"instant-token.{token}"]
        with client.websocket_connect(
            "/v1/instant/session", subprotocols=protocols, headers={"Origin": "https://app.example"}
        ) as socket:
            hear(socket, "session.created")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_only_json_bodies_are_read(kind):
    """A page may send these types to any server without a preflight."""
    headers = {} if kind is None else {"Content-Type": kind}
    with serving() as (client, streaming):
        for path, body in ((OPEN, {"model": "m"}), (opened(client), APPEND), ("/v1/instant/tokens", {"client": "x"})):
            assert client.post(path, content=json.dumps(body), headers=headers).status_code == 415
        assert streaming.manager.sessions == 1


# ------------------------------------------------------------------------------------------------- tokens


def test_a_token_has_fields_that_its_holder_cannot_change_a_number_of_sessions_and_an_end():
    engine, now = FakeEngine(), [0.0]
    with serving(engine, with_key=True, clock=lambda: now[0]) as (client, streaming):
        scope = {
            "session": {"model": "fixed", "max_tokens": 5, "messages": [{"role": "system", "content": "Be kind."}]},
            "max_sessions": 2,
            "session_seconds": 100,
            "seconds": 10_000,
        }
        key = {"Authorization": f"Bearer {KEY}"}
        answer = client.post("/v1/instant/tokens", headers=key, json=scope).json()
        assert answer["expires_in"] == 60.0  # the deployment's limit
        bearer = {"Authorization": f"Bearer {answer['token']}"}
        wish = {"model": "other", "max_tokens": 900, "messages": [], "cache_salt": "theirs"}
        identity = client.post(OPEN, headers=bearer, json=wish).json()["id"]
        assert client.post(f"{OPEN}/{identity}", headers=bearer, json=[APPEND, COMMIT]).status_code == 200
        asked = engine.answered[-1]
        assert (asked["model"], asked["max_tokens"], asked["messages"][0]["content"]) == ("fixed", 5, "Be kind.")
        assert client.post(OPEN, headers=bearer).status_code == 201
        assert client.post(OPEN, headers=bearer).status_code == 429
        assert streaming.manager.sessions == 2


def test_a_session_ends_with_the_time_that_its_token_allows():
    now = [0.0]

    async def run():
        async def ignore(event):
            pass

        with hosting(FakeEngine(), Eager(), clock=lambda: now[0]) as manager:
            tested = Session(manager, manager.enter("me"), ignore, seconds=10.0)
            now[0] = 9.0
            await tested.handle(check(APPEND))
            assert tested.seconds_left == 1.0
            now[0] = 10.0
            assert tested.seconds_left <= 0
            assert tested.closing_event()["error"]["code"] == "expired"
            await tested.close()

    asyncio.run(run())


def test_a_token_belongs_to_the_key_that_made_it():
    scopes = []

    async def app(scope, receive, send):
        scopes.append(scope)

    gate = tokens.AuthMiddleware(app, made := SessionTokens(), keys=("a", "b"))
    for key in ("b", "a", "withdrawn", None):
        headers = [(b"authorization", f"Bearer {made.make('me', 60, key)}".encode())]
        scope = {"type": "http", "path": OPEN, "headers": headers}
        asyncio.run(gate(scope, None, None))
    keys = [dict(scope["headers"])[b"authorization"] for scope in scopes]
    assert keys[:2] == [b"Bearer b", b"Bearer a"]
    assert all(tokens.GRANT not in scope for scope in scopes[2:])


@pytest.mark.parametrize(
    "body",
    [
        {"client": "x" * 129},
        {"session": {"messages": "hi"}},
        {"session": {"a": "x" * 200_000}},
        {"session": {"a": list(range(2000))}},
        {"max_sessions": 0},
        {"seconds": -1},
        {"session_seconds": 0},
    ],
)
def test_the_scope_of_a_token_is_checked(body):
    with serving(with_key=True) as (client, _):
        refused = client.post("/v1/instant/tokens", headers={"Authorization": f"Bearer {KEY}"}, json=body)
        assert refused.status_code in (400, 413)


def test_the_number_of_valid_tokens_is_limited(monkeypatch):
    monkeypatch.setattr(tokens, "MAX_TOKENS", 3)
    now = [0.0]
    made = SessionTokens(lambda: now[0])
    for _ in range(3):
        made.make(None, 10)
    with pytest.raises(TooManyTokensError):
        made.make(None, 10)
    now[0] = 11.0
    assert made.grant_of(made.make(None, 10)) is not None


def test_tokens_that_are_not_shown_again_do_not_stay():
    now = [0.0]
    made = SessionTokens(lambda: now[0])
    lasting = made.make(None, 10_000)
    for _ in range(1000):
        now[0] += 5
        made.make(None, 20)
    assert len(made._grants) <= 20
    assert made.grant_of(lasting) is not None


# ------------------------------------------------------------------------------------------------- renderings


def test_a_client_has_only_so_many_characters_tokenized():
    now = [0.0]
    budget = RenderingBudget(lambda: now[0])
    assert budget.draw("me", budgets.RENDERED_CHARACTERS_BURST) == 0.0
    assert budget.draw("me", budgets.RENDERED_CHARACTERS_PER_SECOND) == 1.0
    assert budget.draw("other", 1000) == 0.0
    now[0] = 1.0
    assert budget.draw("me", 0) == 0.0
    for number in range(3000):  # clients that come once leave nothing behind
        now[0] += 1.0
        budget.draw(f"client {number}", 10)
    assert len(budget._drawn) < 1100


def test_edits_at_the_beginning_of_a_long_text_wait_for_the_clients_budget(monkeypatch):
    monkeypatch.setattr(budgets, "RENDERED_CHARACTERS_BURST", 1000)
    monkeypatch.setattr(budgets, "RENDERED_CHARACTERS_PER_SECOND", 1e-3)
    engine = FakeEngine()
    rendered = []
    render = engine.render

    async def counting(request):
        rendered.append(sum(len(message["content"]) for message in request["messages"]))
        return await render(request)

    engine.render = counting

    async def run():
        async def ignore(event):
            pass

        with hosting(engine, Eager()) as manager:
            tested = Session(manager, manager.enter("me"), ignore)
            await tested.handle(check(UPDATE))
            await tested.handle(check({"type": "input_text.append", "text": "word " * 50}))
            for _ in range(30):
                await tested.handle(check({"type": "input_text.replace", "start": 0, "end": 0, "text": "y "}))
                await asyncio.sleep(2 * prefill_ahead.COALESCE_SECONDS)
            await tested.close()

    asyncio.run(run())
    assert sum(rendered) < 3000  # 30 renderings of 600 characters otherwise


# ------------------------------------------------------------------------------------------------- plain HTTP


def test_a_session_that_is_closed_ends_its_answer():
    engine = FakeEngine()
    engine.answer_gate.clear()

    async def run():
        with hosting(engine, Eager()) as manager:
            streaming = routes.Streaming(SessionTokens())
            streaming.start(manager)
            http = routes.HttpSession(manager, manager.enter("me"), "me")
            streaming._http["s"] = http
            await http.session.handle(check(UPDATE))
            response = await http.commit(check(COMMIT), routes.Request({"type": "http"}, forever))
            lines = response.body_iterator
            assert "assistant" in await anext(lines)
            await streaming._end("s")
            assert "closed" in await anext(lines)
            assert await anext(lines) == "data: [DONE]\n\n"
            assert engine.open_answers == manager.sessions == 0
            streaming._reaper.cancel()

    async def forever():
        await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_client_that_goes_before_the_first_token_frees_its_request():
    engine = FakeEngine()

    async def silent(request, affinity, commit=None, session=None):
        engine.open_answers += 1
        try:
            await asyncio.Event().wait()
            yield {}
        finally:
            engine.open_answers -= 1

    engine.answer = silent

    async def run():
        async def gone():
            while not engine.open_answers:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        with hosting(engine, Eager()) as manager:
            http = routes.HttpSession(manager, manager.enter("me"), "me")
            await http.session.handle(check(UPDATE))
            response = await http.commit(check(COMMIT), routes.Request({"type": "http"}, gone))
            assert response.status_code == 499
            assert engine.open_answers == 0
            assert not http.session.is_answering
            await http.session.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_reader_that_stops_makes_its_session_idle():
    now = [0.0]

    async def run():
        engine = FakeEngine()

        async def endless(request, affinity, commit=None, session=None):
            while True:
                yield {"choices": [{"index": 0, "delta": {"content": "x"}}]}

        async def forever():
            await asyncio.Event().wait()

        engine.answer = endless
        with hosting(engine, Eager(idle_seconds=10.0), clock=lambda: now[0]) as manager:
            http = routes.HttpSession(manager, manager.enter("me"), "me")
            await http.session.handle(check(UPDATE))
            await http.commit(check(COMMIT), routes.Request({"type": "http"}, forever))
            while http._blocked_since is None:
                await asyncio.sleep(0)
            now[0] = 9.0
            assert http.seconds_left > 0
            now[0] = 10.0
            assert http.seconds_left <= 0
            await http.close()
            assert not http.session.is_answering

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_commit_that_is_refused_leaves_the_session_usable():
    with serving() as (client, _):
        path = f"{OPEN}/{client.post(OPEN).json()['id']}"
        assert client.post(path, json=COMMIT).status_code == 400  # no session.update yet
        for _ in range(300):  # more than an answer's queue holds
            assert client.post(path, json=UPDATE).status_code == 200


def test_a_session_whose_close_fails_does_not_keep_others_open():
    with serving(idle_seconds=0.2) as (client, streaming):

        async def broken():
            raise RuntimeError

        for _ in range(2):
            opened(client)
        next(iter(streaming._http.values())).session.close = broken
        deadline = time.monotonic() + 30
        while streaming.manager.sessions:
            assert time.monotonic() < deadline
            time.sleep(0.02)


# ------------------------------------------------------------------------------------------------- pinned blocks


class ManyAtOnce(Eager):
    """Reads two tokens while nothing runs, and only 1000 while something does."""

    def next_chunk(self, progress, load):
        needed = 2 if load.num_running == 0 else 1000
        return progress.stable_tokens if progress.stable_tokens - progress.cached_tokens >= needed else 0


def test_a_pause_in_typing_keeps_neither_the_slot_nor_the_blocks_while_others_run():
    limits = PinLimits(max_sessions=4, max_tokens=1000, max_cache_share=0.5, idle_seconds=0.05)
    engine = FakeEngine()
    engine.running = 1

    async def run():
        async def ignore(event):
            pass

        with hosting(engine, ManyAtOnce(holds=limits)) as manager:
            pausing, other = (Session(manager, manager.enter(name), ignore) for name in ("pausing", "other"))
            for tested, words in ((pausing, 20), (other, 4000)):
                await tested.handle(check(UPDATE))
                await tested.handle(check({"type": "input_text.append", "text": "word " * words}))
            while not engine.prefilled or len(engine.prefilled[-1]) < 1000:
                await asyncio.sleep(0.01)
            while pausing._ahead._is_pinned or not pausing._ahead._idled:
                await asyncio.sleep(0.01)
            # New text pins them again.
            await pausing.handle(check({"type": "input_text.append", "text": "word " * 2000}))
            while not pausing._ahead._is_pinned:
                await asyncio.sleep(0.01)
            await pausing.close()
            await other.close()
        assert engine.holding == []

    asyncio.run(asyncio.wait_for(run(), 60))
