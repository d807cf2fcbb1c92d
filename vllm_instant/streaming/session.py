"""One prompt that is being typed, from its first character to the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from vllm_instant.streaming.connections import size_of
from vllm_instant.streaming.conversation import Conversation
from vllm_instant.streaming.engine import RequestError
from vllm_instant.streaming.events import (
    AppendText,
    CancelResponse,
    ClearText,
    ClientEvent,
    Commit,
    EventError,
    ReplaceText,
    UpdateSession,
)
from vllm_instant.streaming.prefill_ahead import PrefillAhead, Send
from vllm_instant.streaming.session_manager import RefusedError, SessionManager
from vllm_instant.streaming.text import TextError

logger = logging.getLogger("vllm.instant")

MAX_VALUES = 100_000
"""Maximum number of JSON values of a session's request."""
OWN_FIELDS = ("stream",)
"""Fields of the request that the session sets itself."""


class Session:
    """One client's conversation; the caller must ``close`` it.

    Args:
        manager: The sessions of the server.
        number: Unique number of the session, and its affinity.
        send: Sends an event to the client.
        fixed: Fields of the request that the client cannot change.
        seconds: Maximum duration of the session; None for no limit.

    """

    def __init__(
        self,
        manager: SessionManager,
        number: int,
        send: Send,
        fixed: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> None:
        self.id = f"sess_{number}_{manager.new_name()}"
        self._last_event = manager.clock()
        self._ends_at = None if seconds is None else self._last_event + seconds
        self._fixed = dict(fixed or {})
        self._manager = manager
        self._number = number
        self._send = send
        self._said = Conversation(manager.limits.max_text_characters)
        self._answering: asyncio.Task[None] | None = None
        self._ahead = PrefillAhead(manager, number, self.id, self._said, send, lambda: self.is_answering)

    async def handle(self, event: ClientEvent) -> None:
        """Handle an event of the client; raises ``EventError``."""
        self._last_event = self._manager.clock()
        if isinstance(event, UpdateSession):
            await self._update(event)
            return
        if isinstance(event, CancelResponse):
            await self.cancel()
            return
        if isinstance(event, Commit):
            await self._commit(event)
            return
        before = self._said.typed.text
        try:
            if isinstance(event, AppendText):
                self._said.typed.append(event.text)
            elif isinstance(event, ReplaceText):
                self._said.typed.replace(event.start, event.end, event.text)
            elif isinstance(event, ClearText):
                self._said.typed.replace(0, None, "")
            self._resize(self._said.request_bytes)
        except TextError as error:
            raise EventError(str(error), "invalid_text", event.event_id) from None
        except RefusedError as error:
            self._said.typed.text = before
            raise EventError(str(error), "too_many_bytes", event.event_id, status=429) from None
        await self._ahead.text_changed()

    def _resize(self, request_bytes: int) -> None:
        text = self._said.typed.text
        self._manager.resize(self._number, request_bytes + len(text) * (1 if text.isascii() else 4))
        self._said.request_bytes = request_bytes

    async def _update(self, event: UpdateSession) -> None:
        request = {key: value for key, value in event.session.items() if key not in OWN_FIELDS} | self._fixed
        messages = request.pop("messages", [])
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise EventError("session.messages must be a list of chat messages", event_id=event.event_id)
        size, size_before = size_of(event.session, MAX_VALUES), self._said.request_bytes
        try:
            self._resize(size)
        except RefusedError as error:
            raise EventError(str(error), "too_many_bytes", event.event_id, status=429) from None
        before = self._said.request, self._said.messages
        self._said.request, self._said.messages = request, messages
        try:
            await self._manager.may_render(self._number, size)
            await self._manager.engine.render(self._said.body("."))
        except RequestError as error:
            self._said.request, self._said.messages = before
            self._resize(size_before)
            raise EventError(str(error), "invalid_session", event.event_id) from None
        self._said.version += 1
        self._said.configured = True
        await self._ahead.text_changed()
        await self._send({"type": "session.updated", "session": {"id": self.id}})

    async def _commit(self, event: Commit) -> None:
        if not self._said.configured:
            raise EventError("the session has no model yet: send session.update first", "no_session", event.event_id)
        if self.is_answering:
            raise EventError(
                "the last answer is not complete: wait for it, or send response.cancel", "busy", event.event_id
            )
        committed_at = self._manager.clock()
        await self._manager.may_render(self._number, len(self._said.typed.text))
        request = self._said.body(self._said.typed.text)
        chunks = await self._ahead.take_answer(request)
        text = self._said.typed.text
        self._said.typed.replace(0, None, "")
        self._answering = asyncio.get_running_loop().create_task(
            self._answer(chunks, text, committed_at, event.event_id)
        )

    @property
    def is_answering(self) -> bool:
        """Whether an answer is in progress."""
        return self._answering is not None and not self._answering.done()

    @property
    def seconds_left(self) -> float:
        """Seconds until the session is closed: at its end, or when it has been idle too long.

        A session with an answer in progress is not idle.
        """
        now = self._manager.clock()
        left = self._manager.limits.idle_seconds - (0.0 if self.is_answering else now - self._last_event)
        return left if self._ends_at is None else min(left, self._ends_at - now)

    def closing_event(self) -> dict[str, Any]:
        """Return the error event that says why the session is closed."""
        if self._ends_at is not None and self._manager.clock() >= self._ends_at:
            return error_event("the session has reached the duration that its token allows", "expired", status=408)
        idle_seconds = self._manager.limits.idle_seconds
        return error_event(f"no event for {idle_seconds:g} seconds", "idle", status=408)

    async def finished(self) -> None:
        """Return when no answer is in progress."""
        if self._answering is not None:
            await asyncio.wait([self._answering])

    async def cancel(self) -> None:
        """Abort the answer, if there is one."""
        if self._answering is not None and not self._answering.done():
            self._answering.cancel()
            await self.finished()
            await self._send({"type": "response.done", "status": "cancelled"})

    async def _answer(
        self, chunks: AsyncIterator[dict[str, Any]], text: str, committed_at: float, event_id: str | None
    ) -> None:
        contents: list[str] = []
        has_tool_calls = False
        first: float | None = None
        await self._send({"type": "input_text.committed", "event_id": event_id})
        try:
            async with aclosing(chunks) as answer:  # type: ignore[type-var]
                async for chunk in answer:
                    choices = chunk.get("choices") or []
                    if first is None and any(_has_token(choice) for choice in choices):
                        first = self._manager.clock() - committed_at
                        self._manager.metrics.ttft.observe(first)
                    for choice in choices:
                        delta = choice.get("delta") or {}
                        if choice.get("index", 0) == 0:
                            contents.append(delta.get("content") or "")
                        has_tool_calls = has_tool_calls or bool(delta.get("tool_calls"))
                    self._last_event = self._manager.clock()
                    await self._send({"type": "response.chunk", "chunk": chunk})
        except RequestError as error:
            await self._failed(error_event(str(error), "request_failed", event_id, error.code), text)
            return
        except Exception as error:
            logger.exception("An answer of session %s failed", self.id)
            message = f"the answer failed: {type(error).__name__}"
            await self._failed(error_event(message, "server_error", event_id, 500), text)
            return
        # The next prompt follows this turn, except after tool calls, to which the client responds.
        if not has_tool_calls:
            self._said.add_turn(text, "".join(contents))
        self._said.version += 1
        self._ahead.mark_changed()
        await self._send({"type": "response.done", "status": "completed", "first_token_seconds": first})

    async def _failed(self, event: dict[str, Any], text: str) -> None:
        """The answer failed: restore the text from before the commit, so that it can be edited."""
        with suppress(TextError):
            self._said.typed.replace(0, 0, text)
        self._ahead.mark_changed()
        await self._send({**event, "type": "response.done", "status": "failed"})

    async def close(self) -> None:
        """Release all resources; no further event is sent."""
        if self._answering is not None:
            self._answering.cancel()
            await self.finished()
        await self._ahead.close()


def _has_token(choice: dict[str, Any]) -> bool:
    """Whether a choice of a chunk has a token: the first chunk of a choice has only the role."""
    delta = choice.get("delta") or {}
    return bool(
        delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content") or delta.get("tool_calls")
    ) or (choice.get("finish_reason") is not None)


def error_event(message: str, code: str, event_id: str | None = None, status: int = 400) -> dict[str, Any]:
    """Return an error event for the client; ``status`` is the corresponding HTTP status."""
    return {"type": "error", "error": {"message": message, "code": code, "event_id": event_id, "status": status}}
