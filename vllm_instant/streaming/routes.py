"""The routes: a WebSocket, the same events over plain HTTP, session tokens, and a demo page."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import HTTPConnection

from vllm_instant.streaming.connections import ConnectionPolicy, grant_of, read_json, size_of
from vllm_instant.streaming.events import ClientEvent, Commit, EventError, check, parse
from vllm_instant.streaming.http_session import HttpSession, failed, scope_of
from vllm_instant.streaming.prefill_ahead import Send
from vllm_instant.streaming.session import Session, error_event
from vllm_instant.streaming.session_manager import RefusedError, SessionManager
from vllm_instant.streaming.tokens import Grant, SessionTokens, TooManyTokensError, bearer_of

logger = logging.getLogger("vllm.instant")

BASE = "/v1/instant"
DEMO_PATH = f"{BASE}/demo"
SUBPROTOCOL = "instant"
"""Subprotocol that a browser must offer besides its token: the server selects it."""
TRY_AGAIN_LATER, GOING_AWAY, POLICY_VIOLATION = 1013, 1001, 1008
MAX_LISTED_EVENTS = 256
"""Maximum number of events in one HTTP body."""
MAX_GRANT_VALUES = 1_000
"""Maximum number of JSON values of the ``session`` of a token."""
MAX_GRANT_BYTES = 128 << 10
"""Maximum memory of the ``session`` of a token in bytes."""
MAX_NAME_CHARACTERS = 128
"""Maximum length of a client's name."""


class Streaming:
    """The routes of one API server.

    Args:
        tokens: Issues the session tokens.

    """

    def __init__(self, tokens: SessionTokens) -> None:
        self.manager: SessionManager | None = None
        """The sessions; None until the engine is ready."""
        self.tokens = tokens
        self.policy = ConnectionPolicy()
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

    def start(self, manager: SessionManager, policy: ConnectionPolicy | None = None) -> None:
        """Start to serve; called inside the server's event loop."""
        self.manager = manager
        self.policy = policy or ConnectionPolicy()
        self._reaper = asyncio.get_running_loop().create_task(self._reap())

    def _enter(self, connection: HTTPConnection) -> tuple[SessionManager, int, Grant | None]:
        """Let a connection open a session; raises EventError if it may not."""
        manager, grant = self.manager, grant_of(connection)
        if manager is None:
            raise EventError("the server is not ready yet", "not_ready", status=503)
        refusal = self.policy.refusal(connection)
        if refusal is not None:
            raise EventError(refusal, "foreign_origin", status=403)
        try:
            number = manager.enter(self.policy.client_of(connection))
        except RefusedError as error:
            raise EventError(str(error), "too_many_sessions", status=429) from None
        if grant is not None and not grant.take_session():
            manager.leave(number)
            raise EventError("this token has opened all of its sessions", "too_many_sessions", status=429)
        return manager, number, grant

    # -------------------------------------------------------------------------------------------- WebSocket

    async def serve(self, websocket: WebSocket) -> None:
        """Serve one session on a WebSocket until the connection closes."""
        if self.policy.refusal(websocket) is not None:
            # Before the handshake, so that the page learns nothing but the refusal.
            await websocket.close(POLICY_VIOLATION)
            return
        offered = websocket.scope.get("subprotocols", ())
        await websocket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)

        async def send(event: dict[str, Any]) -> None:
            # A closed connection is noticed where events are received.
            with suppress(WebSocketDisconnect, RuntimeError):
                await websocket.send_text(json.dumps(event))

        try:
            manager, number, grant = self._enter(websocket)
        except EventError as error:
            await send(error_event(str(error), error.code, status=error.status))
            await websocket.close(TRY_AGAIN_LATER)
            return
        try:
            session = Session(manager, number, send, *scope_of(grant))
            try:
                await send(created(session, manager))
                await self._follow(websocket, session, manager, send)
            finally:
                await session.close()
        finally:
            manager.leave(number)

    async def _follow(self, websocket: WebSocket, session: Session, manager: SessionManager, send: Send) -> None:
        while True:
            try:
                async with asyncio.timeout(max(session.seconds_left, 0.01)):
                    message = await websocket.receive()
            except TimeoutError:
                if session.seconds_left > 0:
                    continue
                await send(session.closing_event())
                with suppress(WebSocketDisconnect, RuntimeError):
                    await websocket.close(GOING_AWAY)
                return
            if message["type"] == "websocket.disconnect":
                return
            frame = message.get("text")
            frame = frame if frame is not None else message.get("bytes") or b""
            try:
                if len(frame) > manager.limits.max_event_bytes:
                    raise EventError(f"a frame has at most {manager.limits.max_event_bytes} bytes", "too_large")
                await session.handle(parse(frame))
            except EventError as error:
                await send(error_event(str(error), error.code, error.event_id))
            except Exception as error:
                logger.exception("An event of session %s failed", session.id)
                await send(error_event(f"the event failed: {type(error).__name__}", "server_error", status=500))
            # Frames that have arrived are received without suspension: other connections have their turn here.
            await asyncio.sleep(0)

    # ------------------------------------------------------------------------------------------- plain HTTP

    async def open(self, request: Request) -> Response:
        """Open a session; the body is the ``session`` of a ``session.update``, or empty."""
        try:
            body = await self._body_of(request)
            update = check({"type": "session.update", "session": body}) if body else None
            manager, number, grant = self._enter(request)
        except EventError as error:
            return failed(error)
        session = HttpSession(manager, number, self.policy.client_of(request), grant)
        self._http[session.session.id] = session
        if update is not None:
            try:
                await session.session.handle(update)
            except EventError as error:
                await self._end(session.session.id)
                return failed(error)
        return JSONResponse(created(session.session, manager)["session"], status_code=201)

    async def _body_of(self, request: Request) -> Any:
        """The JSON body of a request that a web page may send; None for an empty one. Raises EventError."""
        if self.manager is None:
            raise EventError("the server is not ready yet", "not_ready", status=503)
        refusal = self.policy.refusal(request)
        if refusal is not None:
            raise EventError(refusal, "foreign_origin", status=403)
        return await read_json(request, self.manager.limits.max_event_bytes)

    def _session_of(self, request: Request, session_id: str) -> HttpSession:
        found = self._http.get(session_id)
        if found is None or found.client != self.policy.client_of(request):
            message = "there is no such session; it may have been closed because it was idle"
            raise EventError(message, "no_session", status=404)
        return found

    async def handle(self, request: Request, session_id: str) -> Response:
        """Handle one event or a list of events; the response to a commit is the stream of chunks."""
        try:
            found = self._session_of(request, session_id)
            for event in _events_of(await self._body_of(request)):
                if isinstance(event, Commit):
                    return await found.commit(event, request)
                await found.session.handle(event)
                await asyncio.sleep(0)  # other connections have their turn between the events of a long list
        except EventError as error:
            return failed(error)
        return JSONResponse({"id": session_id, "prefilled_tokens": found.prefilled_tokens})

    async def close(self, request: Request, session_id: str) -> Response:
        """Close a session."""
        try:
            self._session_of(request, session_id)
        except EventError as error:
            return failed(error)
        await self._end(session_id)
        return Response(status_code=204)

    async def _end(self, session_id: str) -> None:
        found = self._http.pop(session_id, None)
        if found is not None and self.manager is not None:
            try:
                await found.close()
            finally:
                self.manager.leave(found.number)

    async def _reap(self) -> None:
        """Close plain HTTP sessions that are idle too long."""
        while self.manager is not None:
            await asyncio.sleep(min(1.0, self.manager.limits.idle_seconds / 4))
            for session_id, found in list(self._http.items()):
                if found.seconds_left > 0:
                    continue
                try:
                    await self._end(session_id)
                except Exception:  # the other sessions must still be closed
                    logger.exception("Session %s was not closed properly", session_id)

    # ----------------------------------------------------------------------------------- tokens and the page

    async def make_token(self, request: Request) -> Response:
        """Issue a session token, which a holder of the API key passes to a browser."""
        try:
            body = await self._body_of(request)
            max_seconds = self.manager.limits.token_seconds if self.manager is not None else 0.0
            client, seconds, scope = _checked_scope({} if body is None else body, max_seconds)
            token = self.tokens.make(client, seconds, bearer_of(request.headers), **scope)
        except EventError as error:
            return failed(error)
        except TooManyTokensError:
            return failed(EventError("too many session tokens are valid; try again later", "too_many", status=429))
        return JSONResponse({"token": token, "expires_in": seconds})

    async def show_demo(self) -> Response:
        """Return the demo page, if the deployment enables it."""
        if self.manager is None or not self.manager.limits.demo_page:
            return failed(EventError("this deployment has no demo page", "no_demo", status=404))
        return HTMLResponse(files("vllm_instant.streaming").joinpath("demo.html").read_text(encoding="utf-8"))


def _events_of(body: Any) -> Iterator[ClientEvent]:
    """The events of an HTTP body, checked one by one; raises EventError."""
    events = body if isinstance(body, list) else [body]
    if len(events) > MAX_LISTED_EVENTS:
        raise EventError(f"a list has at most {MAX_LISTED_EVENTS} events; found {len(events)}", "too_large", status=413)
    if any(isinstance(event, dict) and event.get("type") == "input_text.commit" for event in events[:-1]):
        raise EventError("only the last event of a list may be input_text.commit")
    # All are checked before the first has an effect.
    yield from [check(event) for event in events]


def _checked_scope(body: Any, max_seconds: float) -> tuple[str | None, float, dict[str, Any]]:
    """The client, the lifetime and the rest of a token's scope; raises EventError."""
    try:
        scope = TokenScope.model_validate(body)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"]) or "the body"
        raise EventError(f"{key}: {detail['msg'].lower()}", "invalid_body") from None
    if size_of(scope.session, MAX_GRANT_VALUES) > MAX_GRANT_BYTES:
        raise EventError(f"session: at most {MAX_GRANT_BYTES} bytes", "too_large", status=413)
    if not isinstance(scope.session.get("messages", []), list):
        raise EventError("session.messages must be a list of chat messages", "invalid_body")
    rest = {"session": scope.session, "max_sessions": scope.max_sessions, "session_seconds": scope.session_seconds}
    return scope.client, min(scope.seconds or max_seconds, max_seconds), rest


class TokenScope(BaseModel):
    """The body of a request for a session token; all of it is optional."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    client: str | None = Field(None, max_length=MAX_NAME_CHARACTERS)
    """Name of the client whose limits apply."""
    seconds: float | None = Field(None, gt=0)
    """Seconds for which the token opens sessions, at most the deployment's ``token_seconds``."""
    session: dict[str, Any] = Field(default_factory=dict)
    """Fields of the chat request that the holder cannot change."""
    max_sessions: int | None = Field(None, ge=1)
    """Number of sessions that the token opens in all."""
    session_seconds: float | None = Field(None, gt=0)
    """Seconds after which a session of the token is closed."""


def created(session: Session, manager: SessionManager) -> dict[str, Any]:
    """Return the first event of a session."""
    limits = {"idle_seconds": manager.limits.idle_seconds, "text_characters": manager.limits.max_text_characters}
    return {"type": "session.created", "session": {"id": session.id, **limits}}
