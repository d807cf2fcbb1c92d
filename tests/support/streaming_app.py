"""An application with the routes of streaming sessions over a fake engine, and events for them."""

import time
from contextlib import asynccontextmanager, contextmanager

from fake_streaming import Eager, FakeEngine, hosting
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse

from vllm_instant.streaming.connections import ConnectionPolicy
from vllm_instant.streaming.routes import Streaming
from vllm_instant.streaming.tokens import AuthMiddleware, SessionTokens

KEY = "secret"


class KeyCheck:
    """The API-key check of vLLM for ``/v1``."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        guarded = scope["type"] in ("http", "websocket") and scope["path"].startswith("/v1")
        if guarded and (b"authorization", f"Bearer {KEY}".encode()) not in scope["headers"]:
            await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
            return
        await self._app(scope, receive, send)


@contextmanager
def serving(engine=None, with_key=False, clock=time.monotonic, origins=(), tells_keys=None, **limits):
    """A test client of an application with the routes, and these."""
    tokens = SessionTokens(clock)
    streaming = Streaming(tokens)

    @asynccontextmanager
    async def lifespan(app):
        with hosting(engine or FakeEngine(), Eager(**limits)) as host:
            streaming.start(host, ConnectionPolicy(with_key if tells_keys is None else tells_keys, origins))
            yield

    app = FastAPI(lifespan=lifespan)
    streaming.attach(app)
    if with_key:
        app.add_middleware(KeyCheck)
        app.add_middleware(AuthMiddleware, tokens=tokens, keys=(KEY,), public=("/v1/instant/demo",))
    with TestClient(app) as client:
        yield client, streaming


UPDATE = {"type": "session.update", "session": {"model": "m"}}
APPEND = {"type": "input_text.append", "text": "Why is the sky blue?"}
COMMIT = {"type": "input_text.commit"}


def hear(socket, *types):
    """The next event of one of these types."""
    while (event := socket.receive_json())["type"] not in types:
        pass
    return event
