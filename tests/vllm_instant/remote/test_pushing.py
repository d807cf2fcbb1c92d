"""``/v1/instant/draft`` takes drafts under a key, says nothing about requests, and has limits."""

import asyncio
import threading
from contextlib import asynccontextmanager, contextmanager

import pytest
import uvicorn
from draft_servers import wait_until
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from streaming_app import KEY, KeyCheck

from vllm_instant.remote import protocol, pushing
from vllm_instant.remote.client import DraftPusher, DraftPushError, new_key
from vllm_instant.remote.protocol import Claim, Close, Hello, Open, Tail
from vllm_instant.remote.pushing import ClientDraftMetrics, ClientDrafts
from vllm_instant.streaming.connections import ConnectionPolicy
from vllm_instant.streaming.tokens import AuthMiddleware, SessionTokens

OWN = Hello(protocol.VERSION, "aa", 100)
SECRET = "s" * 20
PATH = "/v1/instant/draft"


def tail(request=0, branch=0):
    return Tail(request, branch, 2, 2, 2, [7, 8], b"")


class Engine:
    """Keeps what is pushed; may fail."""

    def __init__(self):
        self.pushed = []
        self.fails = False

    async def push(self, pushed):
        if self.fails:
            raise RuntimeError("the engine is gone")
        self.pushed.append(pushed)


def application(engine, with_key=False, tokens=None, registry=None):
    drafts = ClientDrafts()

    @asynccontextmanager
    async def lifespan(app):
        metrics = ClientDraftMetrics(registry or CollectorRegistry())
        drafts.start(engine.push, OWN, ConnectionPolicy(with_key), metrics)
        yield

    app = FastAPI(lifespan=lifespan)
    drafts.attach(app)
    if with_key:
        app.add_middleware(KeyCheck)
        app.add_middleware(AuthMiddleware, tokens=tokens or SessionTokens(), keys=(KEY,))
    return app


@contextmanager
def connected(client, *messages, **options):
    with client.websocket_connect(PATH, subprotocols=[protocol.SUBPROTOCOL], **options) as socket:
        for message in messages:
            socket.send_bytes(message if isinstance(message, bytes) else protocol.encode([message]))
        yield socket


def test_drafts_reach_the_engine_under_their_keys():
    engine, registry = Engine(), CollectorRegistry()
    with (
        TestClient(application(engine, registry=registry)) as client,
        connected(client, Hello(protocol.VERSION, "", 0), Claim(3, SECRET)) as socket,
    ):
        assert protocol.read_from_server(socket.receive_bytes()) == [OWN]
        socket.send_bytes(protocol.encode([tail(3), Close(3)]))
        wait_until(lambda: engine.pushed)
        assert registry.get_sample_value("vllm_instant:client_draft_connections") == 1
        assert registry.get_sample_value("vllm_instant:client_draft_messages_total") == 1
    assert engine.pushed == [{SECRET: [[0, 2, 2, 2, [7, 8], b""]]}]
    assert registry.get_sample_value("vllm_instant:client_draft_connections") == 0


FLOOD = [protocol.encode([Claim(0, SECRET)] * 100)] * 6


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([b"\xc1"], protocol.VIOLATION),
        ([Claim(0, SECRET)], protocol.VIOLATION),
        ([Hello(9, "aa", 0)], protocol.MISMATCH),
        ([Hello(protocol.VERSION, "bb", 0)], protocol.MISMATCH),
        ([OWN, OWN], protocol.VIOLATION),
        ([OWN, tail()], protocol.VIOLATION),
        ([OWN, Claim(0, SECRET), Close(0), tail()], protocol.VIOLATION),
        ([OWN, Open(0, [1], 0)], protocol.VIOLATION),
        ([OWN, *(Claim(number, SECRET) for number in range(pushing.MAX_CLAIMS + 1))], protocol.VIOLATION),
        ([OWN, *FLOOD], protocol.VIOLATION),
        ([OWN, bytes(pushing.MAX_FRAME_BYTES + 1)], protocol.VIOLATION),
    ],
    ids=[
        "garbage",
        "no hello",
        "another version",
        "another tokenizer",
        "two hellos",
        "no key",
        "a key that was given back",
        "a message of an engine",
        "many keys",
        "a flood",
        "a huge frame",
    ],
)
def test_a_client_that_breaks_the_protocol_is_left(messages, code):
    engine = Engine()
    with TestClient(application(engine)) as client, connected(client, *messages) as socket:
        with pytest.raises(WebSocketDisconnect) as caught:
            all(iter(socket.receive_bytes, None))
        assert caught.value.code == code
    assert engine.pushed == []


def test_text_frames_are_refused():
    with TestClient(application(Engine())) as client, connected(client) as socket:
        socket.send_text("[]")
        with pytest.raises(WebSocketDisconnect) as caught:
            socket.receive_bytes()
        assert caught.value.code == protocol.VIOLATION


def test_pages_of_other_origins_and_other_subprotocols_are_refused():
    with TestClient(application(Engine())) as client:
        for options in ({"headers": {"origin": "https://evil.example"}}, {"subprotocols": []}):
            options = {"subprotocols": [protocol.SUBPROTOCOL], **options}
            with pytest.raises(WebSocketDisconnect), client.websocket_connect(PATH, **options):
                pass


def test_a_page_needs_a_session_token_where_the_server_has_keys():
    tokens = SessionTokens()
    token = tokens.make("page", 60, KEY)
    with TestClient(application(Engine(), with_key=True, tokens=tokens)) as client:
        origin = {"origin": "https://shop.example"}
        for headers in ({}, {"authorization": "Bearer wrong"}):
            with pytest.raises(WebSocketDenialResponse), connected(client, headers={**origin, **headers}):
                pass
        for credential in (KEY, token):
            with connected(client, OWN, headers={**origin, "authorization": f"Bearer {credential}"}) as socket:
                assert protocol.read_from_server(socket.receive_bytes()) == [OWN]


def test_connections_are_limited(monkeypatch):
    monkeypatch.setattr(pushing, "MAX_CONNECTIONS_PER_CLIENT", 1)
    with TestClient(application(Engine())) as client:
        with connected(client, OWN):
            with pytest.raises(WebSocketDisconnect) as caught, connected(client):
                pass
            assert caught.value.code == pushing.TRY_AGAIN_LATER
        with connected(client, OWN) as socket:
            socket.receive_bytes()


def test_before_the_engine_is_ready_nothing_is_taken():
    app = FastAPI()
    ClientDrafts().attach(app)
    with TestClient(app) as client, pytest.raises(WebSocketDisconnect), connected(client):
        pass


def test_an_engine_that_fails_for_a_while_gets_later_drafts(monkeypatch):
    engine = Engine()
    engine.fails = True
    sleep = asyncio.sleep
    monkeypatch.setattr(pushing.asyncio, "sleep", lambda seconds: sleep(0))
    with TestClient(application(engine)) as client, connected(client, OWN, Claim(0, SECRET)) as socket:
        socket.receive_bytes()
        socket.send_bytes(protocol.encode([tail()]))
        engine.fails = False
        for branch in range(1, 50):
            socket.send_bytes(protocol.encode([tail(branch=branch)]))
        wait_until(lambda: engine.pushed and engine.pushed[-1][SECRET][-1][0] == 49)


@contextmanager
def listening(app):
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def test_the_python_client():
    engine, key = Engine(), new_key()

    async def push(url, **options):
        async with DraftPusher(url, key, **options) as drafts:
            assert drafts.vocab_size == 100
            with pytest.raises(DraftPushError, match="must be begun first"):
                await drafts.extend(5, [1])
            await drafts.begin(5, [7, 8], [1.0, 0.0])
            await drafts.extend(6, [9])
            await drafts.begin(9, [4])
            await asyncio.to_thread(wait_until, lambda: sum(len(one[key]) for one in engine.pushed) == 3)

    with listening(application(engine, with_key=True)) as url:
        asyncio.run(push(url, api_key=KEY, fingerprint="aa"))
        rows = [row for one in engine.pushed for row in one[key]]
        assert rows == [
            [0, 5, 5, 5, [7, 8], b"\xff\x00"],
            [0, 5, 7, 6, [9], b""],
            [1, 9, 9, 9, [4], b""],
        ]
        with pytest.raises(DraftPushError, match="answers HTTP 401"):
            asyncio.run(push(url))
        with pytest.raises(DraftPushError, match="the tokenizers differ"):
            asyncio.run(push(url, api_key=KEY, fingerprint="bb"))
    with listening(FastAPI()) as url, pytest.raises(DraftPushError, match="client_drafts = true"):
        asyncio.run(push(url))
