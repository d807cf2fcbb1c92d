"""A session over plain HTTP: events in bodies, the answer as the response to a commit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from vllm_instant.streaming.events import Commit, EventError
from vllm_instant.streaming.session import Session, error_event
from vllm_instant.streaming.session_manager import SessionManager
from vllm_instant.streaming.tokens import Grant

MAX_BUFFERED_EVENTS = 256
"""Maximum number of events that wait for the reader of an HTTP answer; then the engine merges its output."""


class HttpSession:
    """A session over plain HTTP.

    Args:
        manager: The sessions of the server.
        number: Number of the session.
        client: The client that opened it.
        grant: What the client's token permits, if it has one.

    """

    def __init__(self, manager: SessionManager, number: int, client: str, grant: Grant | None = None) -> None:
        self.client = client
        self.number = number
        self.prefilled_tokens = 0
        self._manager = manager
        self._blocked_since: float | None = None
        """Time since which an event waits for a reader."""
        self._answer: asyncio.Queue[dict[str, Any]] | None = None
        self.session = Session(manager, number, self._send, *scope_of(grant))

    @property
    def seconds_left(self) -> float:
        """Seconds until the session is closed; a reader that takes nothing makes it idle."""
        left = self.session.seconds_left
        if self._blocked_since is None:
            return left
        return min(left, self._blocked_since + self._manager.limits.idle_seconds - self._manager.clock())

    async def _send(self, event: dict[str, Any]) -> None:
        if event["type"] == "input_text.prefilled":
            self.prefilled_tokens = event["tokens"]
        elif self._answer is not None:
            self._blocked_since = self._manager.clock()
            try:
                await self._answer.put(event)
            finally:
                self._blocked_since = None

    async def close(self) -> None:
        """Release all resources and end the response to a commit, if there is one."""
        answer = self._answer
        await self.session.close()
        if answer is not None:
            if answer.full():
                answer.get_nowait()
            answer.put_nowait(error_event("the session was closed", "closed", status=410) | {"type": "response.done"})

    async def commit(self, event: Commit, request: Request) -> Response:
        """Return the answer as server-sent events, as ``/v1/chat/completions`` streams it."""
        if self._answer is not None or self.session.is_answering:
            raise EventError("the last answer is not complete", "busy", event.event_id, status=409)
        answer: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_BUFFERED_EVENTS)
        self._answer = answer
        try:
            await self.session.handle(event)
            first = await self._first(answer, request)
        except BaseException:
            self._answer = None
            raise
        if first is None or "error" in first:
            self._answer = None
            await self.session.cancel()
            await self.session.finished()
            return failed(first or error_event("the client closed the connection", "closed", status=499))
        return StreamingResponse(self._stream(first, answer), media_type="text/event-stream")

    @staticmethod
    async def _first(answer: asyncio.Queue[dict[str, Any]], request: Request) -> dict[str, Any] | None:
        """The first event of the answer; None if the client closes the connection before."""
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            while True:
                event = asyncio.ensure_future(answer.get())
                await asyncio.wait((event, gone), return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    return None
                if event.result()["type"] != "input_text.committed":
                    return event.result()
        finally:
            gone.cancel()

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


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def scope_of(grant: Grant | None) -> tuple[Mapping[str, Any] | None, float | None]:
    """The fixed fields and the duration of a session."""
    return (None, None) if grant is None else (grant.session, grant.session_seconds)


def failed(error: EventError | dict[str, Any]) -> Response:
    """Return an error, or an error event, as a response."""
    if isinstance(error, EventError):
        error = error_event(str(error), error.code, error.event_id, error.status)
    return JSONResponse({"error": error["error"]}, status_code=error["error"]["status"])
