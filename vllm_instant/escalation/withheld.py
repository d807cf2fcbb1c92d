"""An answer that is kept back until the client has something to read, since a guard may stop it before that."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_instant.escalation.client import Message, Send

STOPPED = "content_filter"
"""The ``finish_reason`` of an answer that a guard has stopped."""
_EVENT_STREAM = b"text/event-stream"
_ROLE = "role"


class WithheldAnswer:
    """The messages of one answer. A stream passes from its first readable part on, a whole answer at its end.

    Args:
        send: Gets the messages that pass.

    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._kept: list[Message] = []
        self._passes = False
        self._is_stream = False
        self._rest = b""
        self._is_complete = False
        self.is_stopped = False
        """Whether a guard has stopped the answer, and the client has read nothing of it."""

    async def send(self, message: Message) -> None:
        """ASGI's ``send`` for the application."""
        if self._passes:
            await self._send(message)
            return
        self._kept.append(message)
        if message["type"] == "http.response.start":
            kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            self._is_stream = any(kind.startswith(_EVENT_STREAM) for kind in kinds)
            if message["status"] != 200:
                await self.release()
            return
        has_ended = not message.get("more_body", False)
        self._rest += message.get("body", b"")
        if (self._is_stream and self._is_readable()) or (has_ended and not self._has_stopped()):
            await self.release()
        elif has_ended:
            self.is_stopped = True

    async def release(self) -> None:
        """Let the messages pass that were kept."""
        self._passes, kept = True, self._kept
        self._kept = []
        for message in kept:
            await self._send(message)

    def _is_readable(self) -> bool:
        """Whether the events so far have anything for the client but the guard's stop."""
        *events, self._rest = self._rest.split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                self._is_complete = True
            if data == b"[DONE]" or not data:
                continue
            choices = list(_choices(data))
            if not choices and b'"usage"' not in data:
                return True  # an error, or nothing that is known here
            for choice in choices:
                reason = choice.get("finish_reason")
                if reason not in (None, STOPPED) or (reason is None and _has_text(choice)):
                    return True
        return False

    def _has_stopped(self) -> bool:
        """Whether the guard has stopped all choices of an answer that has ended with nothing readable."""
        if self._is_stream:
            return self._is_complete  # with nothing readable: only a guard ends an answer so
        reasons = [choice.get("finish_reason") for choice in _choices(self._rest)]
        return bool(reasons) and all(reason == STOPPED for reason in reasons)


def _choices(data: bytes) -> Iterator[Mapping[str, Any]]:
    try:
        found = json.loads(data)
    except ValueError:
        return
    choices = found.get("choices") if isinstance(found, dict) else None
    yield from (choice for choice in choices or () if isinstance(choice, dict))


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(value for key, value in delta.items() if key != _ROLE)
    return bool(choice.get("text"))
