"""The routes: a WebSocket, the same over plain HTTP, session tokens, and a page to try it."""

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
"""What a browser that hands over a token must also offer: the server names it back."""
TRY_AGAIN_LATER, GOING_AWAY = 1013, 1001
EVENTS_AHEAD = 256
"""Events that wait for a reader of a plain HTTP answer; then the engine's answer collects in bigger ones."""


class Streaming:
    """The routes of one API server.

    Args:
        tokens: makes the session tokens.

    """

    def __init__(self, tokens: SessionTokens) -> None:
        self.host: SessionManager | None = None
        """What serves; None until the engine is there."""
        self.tokens = tokens
        self._http: dict[str, HttpSession] = {}
        self._reaper: asyncio.Task[None] | None = None

    def attach(self, app: FastAPI) -> None:
        """Add the routes, under ``/v1`` so that the API key guards them."""
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

    def start(self, host: SessionManager) -> None:
        """Serve from now on; called inside the server's event loop."""
        self.host = host
        self._reaper = asyncio.get_running_loop().create_task(self._reap())

    # -------------------------------------------------------------------------------------------- WebSocket

    async def serve(self, websocket: WebSocket) -> None:
        """One client, one session, as long as the connection lasts."""
        offered = websocket.scope.get("subprotocols", ())
        await websocket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)

        async def send(event: dict[str, Any]) -> None:
            # Whoever has gone is noticed where events are received.
            with suppress(WebSocketDisconnect, RuntimeError):
                await websocket.send_text(json.dumps(event))

        host, client = self.host, client_of(websocket)
        if host is None:
            await send(error_event("the server is not ready yet", "not_ready", status=503))
            await websocket.close(TRY_AGAIN_LATER)
            return
        try:
            number = host.enter(client)
        except RefusedError as error:
            await send(error_event(str(error), "too_many_sessions", status=429))
            await websocket.close(TRY_AGAIN_LATER)
            return
        try:
            session = Session(host, number, send)
            try:
                await send(created(session, host))
                await self._follow(websocket, session, host, send)
            finally:
                await session.close()
        finally:
            host.leave(client)

    async def _follow(self, websocket: WebSocket, session: Session, host: SessionManager, send: Send) -> None:
        while True:
            try:
                async with asyncio.timeout(max(session.seconds_left, 0.01)):
                    message = await websocket.receive()
            except TimeoutError:
                if session.seconds_left > 0:
                    continue
                await send(idle_event(host))
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
        """Open a session; the body is that of ``session.update``, or empty."""
        host, client = self.host, client_of(request)
        if host is None:
            return failed(error_event("the server is not ready yet", "not_ready", status=503))
        try:
            body = json.loads(await request.body() or b"{}")
            update = check({"type": "session.update", "session": body}) if body != {} else None
        except ValueError as error:
            return failed(error_event(f"the body is not JSON: {error}", "invalid_json"))
        except EventError as error:
            return failed(error_event(str(error), error.code))
        try:
            number = host.enter(client)
        except RefusedError as error:
            return failed(error_event(str(error), "too_many_sessions", status=429))
        session = HttpSession(host, number, client)
        self._http[session.session.id] = session
        if update is not None:
            try:
                await session.session.handle(update)
            except EventError as error:
                await self._end(session.session.id)
                return failed(error_event(str(error), error.code))
        return JSONResponse(created(session.session, host)["session"], status_code=201)

    async def handle(self, request: Request, session_id: str) -> Response:
        """Carry out one event, or a list of them; a commit is answered by the stream of chunks."""
        found = self._http.get(session_id)
        if found is None or found.client != client_of(request):
            return failed(
                error_event("there is no such session; it may have been idle too long", "no_session", None, 404)
            )
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
        """End a session."""
        found = self._http.get(session_id)
        if found is None or found.client != client_of(request):
            return failed(
                error_event("there is no such session; it may have been idle too long", "no_session", None, 404)
            )
        await self._end(session_id)
        return Response(status_code=204)

    async def _end(self, session_id: str) -> None:
        found = self._http.pop(session_id, None)
        if found is not None and self.host is not None:
            self.host.leave(found.client)
            await found.session.close()

    async def _reap(self) -> None:
        """End plain HTTP sessions that nobody uses any more."""
        while self.host is not None:
            await asyncio.sleep(min(1.0, self.host.limits.idle_seconds / 4))
            for session_id, found in list(self._http.items()):
                if found.session.seconds_left <= 0:
                    await self._end(session_id)

    # ----------------------------------------------------------------------------------- tokens and the page

    async def make_token(self, request: Request) -> Response:
        """A session token, for whoever has the API key to hand to a browser."""
        if self.host is None:
            return failed(error_event("the server is not ready yet", "not_ready", status=503))
        try:
            body = json.loads(await request.body() or b"{}")
        except ValueError as error:
            return failed(error_event(f"the body is not JSON: {error}", "invalid_json"))
        client = body.get("client") if isinstance(body, dict) else None
        if not isinstance(body, dict) or body.keys() - {"client"} or not isinstance(client, str | None):
            return failed(error_event('the body may be {"client": "a name"} or empty', "invalid_body"))
        seconds = self.host.limits.token_seconds
        return JSONResponse({"token": self.tokens.make(client, seconds), "expires_in": seconds})

    async def show_demo(self) -> Response:
        """The page to try it, where the deployment says so."""
        if self.host is None or not self.host.limits.demo_page:
            return failed(error_event("this deployment has no demo page", "no_demo", status=404))
        return HTMLResponse(files("vllm_instant.streaming").joinpath("demo.html").read_text(encoding="utf-8"))


class HttpSession:
    """A session over plain HTTP: its events wait for the next request.

    Args:
        host: what serves.
        number: of the session.
        client: who opened it.

    """

    def __init__(self, host: SessionManager, number: int, client: str) -> None:
        self.client = client
        self.prefilled_tokens = 0
        self._answer: asyncio.Queue[dict[str, Any]] | None = None
        self.session = Session(host, number, self._send)

    async def _send(self, event: dict[str, Any]) -> None:
        if event["type"] == "input_text.prefilled":
            self.prefilled_tokens = event["tokens"]
        elif self._answer is not None:
            await self._answer.put(event)

    async def commit(self, event: Commit) -> Response:
        """The answer as server-sent events, as ``/v1/chat/completions`` streams it."""
        if self.session.is_answering:
            raise EventError("the last answer is not complete", "busy", event.event_id)
        answer: asyncio.Queue[dict[str, Any]] = asyncio.Queue(EVENTS_AHEAD)
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
    """Whose session it is: a session token's client, the API key, or the address."""
    if CLIENT in connection.scope:
        return f"token {connection.scope[CLIENT]}"
    authorization = connection.headers.get("authorization")
    if authorization:
        return f"key {hashlib.sha256(authorization.encode()).hexdigest()}"
    return f"address {connection.client.host if connection.client else ''}"


def created(session: Session, host: SessionManager) -> dict[str, Any]:
    """The event that begins a session."""
    limits = {"idle_seconds": host.limits.idle_seconds, "text_characters": host.limits.max_text_characters}
    return {"type": "session.created", "session": {"id": session.id, **limits}}


def idle_event(host: SessionManager) -> dict[str, Any]:
    """Why a session is closed."""
    return error_event(f"nothing came for {host.limits.idle_seconds:g} seconds", "idle", status=408)


def failed(event: dict[str, Any]) -> Response:
    """An error event as an answer."""
    return JSONResponse({"error": event["error"]}, status_code=event["error"]["status"])
