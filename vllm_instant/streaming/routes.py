"""The routes: a WebSocket, the same events over plain HTTP, session tokens, and a demo page."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.requests import HTTPConnection

from vllm_instant.streaming.events import Commit, EventError, check, parse
from vllm_instant.streaming.session import Send, Session, error_event
from vllm_instant.streaming.session_manager import RefusedError, SessionManager
from vllm_instant.streaming.tokens import CLIENT, SessionTokens

logger = logging.getLogger("vllm.instant")

BASE = "/v1/instant"
DEMO_PATH = f"{BASE}/demo"
SUBPROTOCOL = "instant"
"""Subprotocol that a browser must offer besides its token: the server selects it."""
TRY_AGAIN_LATER, GOING_AWAY = 1013, 1001
MAX_BUFFERED_EVENTS = 256
"""Maximum number of events that wait for the reader of an HTTP answer; then the engine merges its output."""


class Streaming:
    """The routes of one API server.

    Args:
        tokens: Issues the session tokens.

    """

    def __init__(self, tokens: SessionTokens) -> None:
        self.manager: SessionManager | None = None
        """The sessions; None until the engine is ready."""
        self.tokens = tokens
        self._http: dict[str, HttpSession] = {}
        self._reaper: asyncio.Task[None] | None = None

    def attach(self, app: FastAPI) -> None:
        """Add the routes under ``/v1``, where the API key guards them."""
        tags: list[Any] = ["vllm-instant"]
        app.add_api_websocket_route(f"{BASE}/session", self.serve)
        for path, method, endpoint in (
            ("sessions", "POST", self.open),
            ("sessions/{session_id}", "POST", self.handle),
            ("sessions/{session_id}", "DELETE", self.close),
            ("tokens", "POST", self.make_token),
            ("demo", "GET", self.show_demo),
        ):
            app.add_api_route(f"{BASE}/{path}", endpoint, methods=[method], tags=tags, response_model=None)

    def start(self, manager: SessionManager) -> None:
        """Start to serve; called inside the server's event loop."""
        self.manager = manager
        self._reaper = asyncio.get_running_loop().create_task(self._reap())

    # -------------------------------------------------------------------------------------------- WebSocket

    async def serve(self, websocket: WebSocket) -> None:
        """Serve one session on a WebSocket until the connection closes."""
        offered = websocket.scope.get("subprotocols", ())
        await websocket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)

        async def send(event: dict[str, Any]) -> None:
            # A closed connection is noticed where events are received.
            with suppress(WebSocketDisconnect, RuntimeError):
                await websocket.send_text(json.dumps(event))

        manager, client = self.manager, client_of(websocket)
        if manager is None:
            await send(error_event("the server is not ready yet", "not_ready", status=503))
            await websocket.close(TRY_AGAIN_LATER)
            return
        try:
            number = manager.enter(client)
        except RefusedError as error:
            await send(error_event(str(error), "too_many_sessions", status=429))
            await websocket.close(TRY_AGAIN_LATER)
            return
        try:
            session = Session(manager, number, send)
            try:
                await send(created(session, manager))
                await self._follow(websocket, session, manager, send)
            finally:
                await session.close()
        finally:
            manager.leave(client)

    async def _follow(self, websocket: WebSocket, session: Session, manager: SessionManager, send: Send) -> None:
        while True:
            try:
                async with asyncio.timeout(max(session.seconds_left, 0.01)):
                    message = await websocket.receive()
            except TimeoutError:
                if session.seconds_left > 0:
                    continue
                await send(idle_event(manager))
                with suppress(WebSocketDisconnect, RuntimeError):
                    await websocket.close(GOING_AWAY)
                return
            if message["type"] == "websocket.disconnect":
                return
            frame = message.get("text")
            try:
                await session.handle(parse(frame if frame is not None else message.get("bytes") or b""))
            except EventError as error:
                await send(error_event(str(error), error.code, error.event_id))
            except Exception as error:
                logger.exception("An event of session %s failed", session.id)
                await send(error_event(f"the event failed: {type(error).__name__}", "server_error", status=500))

    # ------------------------------------------------------------------------------------------- plain HTTP

    async def open(self, request: Request) -> Response:
        """Open a session; the body is the ``session`` of a ``session.update``, or empty."""
        manager, client = self.manager, client_of(request)
        if manager is None:
            return failed(error_event("the server is not ready yet", "not_ready", status=503))
        try:
            body = json.loads(await request.body() or b"{}")
            update = check({"type": "session.update", "session": body}) if body != {} else None
        except ValueError as error:
            return failed(error_event(f"the body is not JSON: {error}", "invalid_json"))
        except EventError as error:
            return failed(error_event(str(error), error.code))
        try:
            number = manager.enter(client)
        except RefusedError as error:
            return failed(error_event(str(error), "too_many_sessions", status=429))
        session = HttpSession(manager, number, client)
        self._http[session.session.id] = session
        if update is not None:
            try:
                await session.session.handle(update)
            except EventError as error:
                await self._end(session.session.id)
                return failed(error_event(str(error), error.code))
        return JSONResponse(created(session.session, manager)["session"], status_code=201)

    async def handle(self, request: Request, session_id: str) -> Response:
        """Handle one event or a list of events; the response to a commit is the stream of chunks."""
        found = self._http.get(session_id)
        if found is None or found.client != client_of(request):
            return failed(_no_such_session())
        try:
            body = json.loads(await request.body())
            events = [check(event) for event in (body if isinstance(body, list) else [body])]
            if any(isinstance(event, Commit) for event in events[:-1]):
                raise EventError("only the last event of a list may be input_text.commit")
            for event in events:
                if isinstance(event, Commit):
                    return await found.commit(event)
                await found.session.handle(event)
        except ValueError as error:
            return failed(error_event(f"the body is not JSON: {error}", "invalid_json"))
        except EventError as error:
            return failed(error_event(str(error), error.code, error.event_id))
        return JSONResponse({"id": session_id, "prefilled_tokens": found.prefilled_tokens})

    async def close(self, request: Request, session_id: str) -> Response:
        """Close a session."""
        found = self._http.get(session_id)
        if found is None or found.client != client_of(request):
            return failed(_no_such_session())
        await self._end(session_id)
        return Response(status_code=204)

    async def _end(self, session_id: str) -> None:
        found = self._http.pop(session_id, None)
        if found is not None and self.manager is not None:
            self.manager.leave(found.client)
            await found.session.close()

    async def _reap(self) -> None:
        """Close plain HTTP sessions that are idle too long."""
        while self.manager is not None:
            await asyncio.sleep(min(1.0, self.manager.limits.idle_seconds / 4))
            for session_id, found in list(self._http.items()):
                if found.session.seconds_left <= 0:
                    await self._end(session_id)

    # ----------------------------------------------------------------------------------- tokens and the page

    async def make_token(self, request: Request) -> Response:
        """Issue a session token, which a holder of the API key passes to a browser."""
        if self.manager is None:
            return failed(error_event("the server is not ready yet", "not_ready", status=503))
        try:
            body = json.loads(await request.body() or b"{}")
        except ValueError as error:
            return failed(error_event(f"the body is not JSON: {error}", "invalid_json"))
        client = body.get("client") if isinstance(body, dict) else None
        if not isinstance(body, dict) or body.keys() - {"client"} or not isinstance(client, str | None):
            return failed(error_event('the body may be {"client": "a name"} or empty', "invalid_body"))
        seconds = self.manager.limits.token_seconds
        return JSONResponse({"token": self.tokens.make(client, seconds), "expires_in": seconds})

    async def show_demo(self) -> Response:
        """Return the demo page, if the deployment enables it."""
        if self.manager is None or not self.manager.limits.demo_page:
            return failed(error_event("this deployment has no demo page", "no_demo", status=404))
        return HTMLResponse(files("vllm_instant.streaming").joinpath("demo.html").read_text(encoding="utf-8"))


class HttpSession:
    """A session over plain HTTP.

    Args:
        manager: The sessions of the server.
        number: Number of the session.
        client: The client that opened it.

    """

    def __init__(self, manager: SessionManager, number: int, client: str) -> None:
        self.client = client
        self.prefilled_tokens = 0
        self._answer: asyncio.Queue[dict[str, Any]] | None = None
        self.session = Session(manager, number, self._send)

    async def _send(self, event: dict[str, Any]) -> None:
        if event["type"] == "input_text.prefilled":
            self.prefilled_tokens = event["tokens"]
        elif self._answer is not None:
            await self._answer.put(event)

    async def commit(self, event: Commit) -> Response:
        """Return the answer as server-sent events, as ``/v1/chat/completions`` streams it."""
        if self.session.is_answering:
            raise EventError("the last answer is not complete", "busy", event.event_id)
        answer: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_BUFFERED_EVENTS)
        self._answer = answer
        await self.session.handle(event)
        first = await answer.get()
        while first["type"] == "input_text.committed":
            first = await answer.get()
        if "error" in first:
            self._answer = None
            await self.session.finished()
            return failed(first)
        return StreamingResponse(self._stream(first, answer), media_type="text/event-stream")

    async def _stream(self, event: dict[str, Any], answer: asyncio.Queue[dict[str, Any]]) -> AsyncIterator[str]:
        try:
            while event["type"] != "response.done":
                if event["type"] == "response.chunk":
                    yield f"data: {json.dumps(event['chunk'])}\n\n"
                event = await answer.get()
            if "error" in event:
                yield f"data: {json.dumps({'error': event['error']})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self._answer = None
            await self.session.cancel()


def client_of(connection: HTTPConnection) -> str:
    """Return the client of a connection: that of its session token, its API key, or its address."""
    if CLIENT in connection.scope:
        return f"token {connection.scope[CLIENT]}"
    authorization = connection.headers.get("authorization")
    if authorization:
        return f"key {hashlib.sha256(authorization.encode()).hexdigest()}"
    return f"address {connection.client.host if connection.client else ''}"


def created(session: Session, manager: SessionManager) -> dict[str, Any]:
    """Return the first event of a session."""
    limits = {"idle_seconds": manager.limits.idle_seconds, "text_characters": manager.limits.max_text_characters}
    return {"type": "session.created", "session": {"id": session.id, **limits}}


def idle_event(manager: SessionManager) -> dict[str, Any]:
    """Return the event that closes an idle session."""
    return error_event(f"no event for {manager.limits.idle_seconds:g} seconds", "idle", status=408)


def _no_such_session() -> dict[str, Any]:
    message = "there is no such session; it may have been closed because it was idle"
    return error_event(message, "no_session", status=404)


def failed(event: dict[str, Any]) -> Response:
    """Return an error event as a response."""
    return JSONResponse({"error": event["error"]}, status_code=event["error"]["status"])
