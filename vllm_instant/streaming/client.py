"""A client that sends prompts while they are being typed.

    async with StreamingSession("http://127.0.0.1:8000", model="demo") as session:
        await session.append("Why is the ")
        await session.append("sky blue?")
        async for chunk in session.commit():
            print(chunk["choices"][0]["delta"].get("content") or "", end="")

The package ``websockets`` is a dependency of vLLM.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import websockets


class StreamingError(Exception):
    """An error of the server, with its message.

    Attributes:
        code: Machine-readable kind of the error.

    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class StreamingSession:
    """One conversation whose prompts are prefilled while they are typed; an asynchronous context manager.

    Args:
        url: URL of the server, without ``/v1``.
        api_key: API key of the server.
        token: A session token of ``POST /v1/instant/tokens``, instead of the key.
        request: Fields of a body of ``/v1/chat/completions``: ``model``, ``messages`` (the system prompt and earlier
            turns), ``temperature`` and so on.

    """

    def __init__(self, url: str, *, api_key: str | None = None, token: str | None = None, **request: Any) -> None:
        self._url = "ws" + url.rstrip("/").removeprefix("http") + "/v1/instant/session"
        credential = api_key or token
        self._headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        self._request = request
        self._connection: websockets.ClientConnection | None = None
        self.id = ""
        """The server's id of the session, once it is open."""
        self.prefilled_tokens = 0
        """Number of prefilled prompt tokens, as the server last reported it."""
        self.first_token_seconds: float | None = None
        """Seconds from the last commit to the first token, measured by the server."""

    async def __aenter__(self) -> Self:
        try:
            self._connection = await websockets.connect(self._url, additional_headers=self._headers, max_size=None)
        except websockets.InvalidStatus as error:
            raise StreamingError(
                f"{self._url} answers HTTP {error.response.status_code}; 401: an API key is needed, 403 and 404: the "
                "server needs [streaming] plugin = 'chunked'",
                "refused",
            ) from None
        try:
            self.id = (await self._next("session.created"))["session"]["id"]
            await self.update(**self._request)
        except BaseException:
            await self._connection.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def update(self, **request: Any) -> None:
        """Replace the request except for the text; ``messages`` replaces the earlier turns."""
        self._request = request
        await self._send({"type": "session.update", "session": request})
        await self._next("session.updated")

    async def append(self, text: str) -> None:
        """Append text."""
        await self._send({"type": "input_text.append", "text": text})

    async def replace(self, start: int, end: int | None, text: str) -> None:
        """Replace the characters ``start:end`` by ``text``; with ``end`` None, all from ``start``."""
        await self._send({"type": "input_text.replace", "start": start, "end": end, "text": text})

    async def clear(self) -> None:
        """Delete the text."""
        await self._send({"type": "input_text.clear"})

    async def commit(self) -> AsyncIterator[dict[str, Any]]:
        """Commit the prompt and yield the chunks of the answer, as ``/v1/chat/completions`` streams them.

        Call ``cancel`` to abort the answer. Raises ``StreamingError`` if the request cannot be answered; the text is
        then unchanged.
        """
        await self._send({"type": "input_text.commit"})
        while (event := await self._next("response.chunk", "response.done"))["type"] != "response.done":
            yield event["chunk"]
        if "error" in event:
            raise StreamingError(event["error"]["message"], event["error"]["code"])
        self.first_token_seconds = event.get("first_token_seconds")

    async def cancel(self) -> None:
        """Abort the answer."""
        await self._send({"type": "response.cancel"})
        while (await self._next("response.chunk", "response.done"))["type"] != "response.done":
            pass

    async def _send(self, event: dict[str, Any]) -> None:
        if self._connection is None:
            raise StreamingError("the session is not open: use it with 'async with'", "closed")
        try:
            await self._connection.send(json.dumps(event))
        except websockets.ConnectionClosed as error:
            raise StreamingError(f"the server closed the session: {error}", "closed") from None

    async def _next(self, *types: str) -> dict[str, Any]:
        """Return the next event of these types; raises ``StreamingError`` for an error event."""
        if self._connection is None:
            raise StreamingError("the session is not open: use it with 'async with'", "closed")
        while True:
            try:
                event: dict[str, Any] = json.loads(await self._connection.recv())
            except websockets.ConnectionClosed as error:
                raise StreamingError(f"the server closed the session: {error}", "closed") from None
            if event["type"] == "error":
                raise StreamingError(event["error"]["message"], event["error"]["code"])
            if event["type"] == "input_text.prefilled":
                self.prefilled_tokens = event["tokens"]
            if event["type"] in types:
                return event
