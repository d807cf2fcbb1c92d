"""The connection to one client, as ASGI has it: its request, its disconnect, and answers of this server's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any, TypeVar

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Result = TypeVar("Result")

_DISCONNECT = "http.disconnect"


class DisconnectError(Exception):
    """The client has left."""


class Client:
    """One client during one request.

    Args:
        receive: ASGI's.
        send: ASGI's.

    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self.send = send
        self._gone: asyncio.Task[None] | None = None

    async def read(self) -> bytes:
        """Return the body of the request; raises DisconnectError."""
        parts: list[bytes] = []
        while True:
            message = await self._receive()
            if message["type"] == _DISCONNECT:
                raise DisconnectError
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts)

    async def unless_gone(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return the result of ``work``, which is cancelled where the client leaves; raises DisconnectError then."""
        task = asyncio.ensure_future(work)
        gone = self._watch()
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise DisconnectError
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def replay(self, body: bytes) -> Receive:
        """Return ASGI's ``receive`` for an application that reads this body and then waits for the client to leave."""
        has_read = False

        async def receive() -> Message:
            nonlocal has_read
            if not has_read:
                has_read = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.shield(self._watch())
            return {"type": _DISCONNECT}

        return receive

    def close(self) -> None:
        """The request is over."""
        if self._gone is not None:
            self._gone.cancel()

    def _watch(self) -> asyncio.Task[None]:
        if self._gone is None:
            self._gone = asyncio.ensure_future(self._wait_until_gone())
        return self._gone

    async def _wait_until_gone(self) -> None:
        while (await self._receive())["type"] != _DISCONNECT:
            pass


def with_body(scope: Scope, body: bytes, headers: Mapping[str, str]) -> Scope:
    """Return the scope of a request with another body, and with these headers in place of those of the same names."""
    replaced = {"content-length": str(len(body)), "content-type": "application/json", **headers}
    names = {name.encode() for name in replaced} | {b"transfer-encoding"}
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in names]
    return {**scope, "headers": [*kept, *((name.encode(), value.encode()) for name, value in replaced.items())]}


async def ask(app: App, scope: Scope, body: Mapping[str, Any], request_id: str) -> Mapping[str, Any]:
    """Return the answer of an application to a JSON request; an empty one where it is no success."""
    content = json.dumps(body).encode()
    status = 0
    parts: list[bytes] = []
    has_read = False

    async def receive() -> Message:
        nonlocal has_read
        if has_read:
            await asyncio.Event().wait()  # this client does not leave; it is cancelled
        has_read = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    await app(with_body(scope, content, {"x-request-id": request_id}), receive, send)
    try:
        answer = json.loads(b"".join(parts)) if status == 200 else {}
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
