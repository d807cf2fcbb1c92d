"""A client for prompts that are sent while they are being written.

    async with StreamingSession("http://127.0.0.1:8000", model="demo") as session:
        await session.append("Why is the ")
        await session.append("sky blue?")
        async for chunk in session.commit():
            print(chunk["choices"][0]["delta"].get("content") or "", end="")

Needs the package ``websockets``, which vLLM brings along.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import websockets


class StreamingError(Exception):
    """The server refused something; the message is its own.

    Attributes:
        code: the server's word for it.

    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class StreamingSession:
    """One conversation whose prompts are read ahead; an asynchronous context manager.

    Args:
        url: the server, without ``/v1``.
        api_key: of the server; or ``token``, a session token.
        token: from ``POST /v1/instant/tokens``.
        request: what a body of ``/v1/chat/completions`` may have: ``model``, ``messages`` (the system prompt and
            earlier turns), ``temperature`` and so on.

    """

    def __init__(self, url: str, *, api_key: str | None = None, token: str | None = None, **request: Any) -> None:
        self._url = "ws" + url.rstrip("/").removeprefix("http") + "/v1/instant/session"
        credential = api_key or token
        self._headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        self._request = request
        self._connection: websockets.ClientConnection | None = None
        self.id = ""
        """The session's name in the server, once it is open."""
        self.prefilled_tokens = 0
        """How many tokens of the prompt had been read ahead when the server last said so."""
        self.first_token_seconds: float | None = None
        """From the last commit to the first token, as the server saw it."""

    async def __aenter__(self) -> Self:
        try:
            self._connection = await websockets.connect(self._url, additional_headers=self._headers, max_size=None)
        except websockets.InvalidStatus as error:
            raise StreamingError(
                f"{self._url} answers HTTP {error.response.status_code}: 401 wants an API key, 403 and 404 a server "
                "with [streaming] plugin = 'chunked'",
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
        """Replace the request apart from the text; earlier turns are what ``messages`` now says."""
        self._request = request
        await self._send({"type": "session.update", "session": request})
        await self._next("session.updated")

    async def append(self, text: str) -> None:
        """Add text at the end."""
        await self._send({"type": "input_text.append", "text": text})

    async def replace(self, start: int, end: int | None, text: str) -> None:
        """Put text in the place of ``start:end`` (characters); None: of everything from ``start``."""
        await self._send({"type": "input_text.replace", "start": start, "end": end, "text": text})

    async def clear(self) -> None:
        """Forget the text."""
        await self._send({"type": "input_text.clear"})

    async def commit(self) -> AsyncIterator[dict[str, Any]]:
        """The prompt is complete: the chunks of the answer, as ``/v1/chat/completions`` streams them.

        Whoever stops early should ``cancel``. Raises StreamingError where the request cannot be answered; the text is
        then as before.
        """
        await self._send({"type": "input_text.commit"})
        while (event := await self._next("response.chunk", "response.done"))["type"] != "response.done":
            yield event["chunk"]
        if "error" in event:
            raise StreamingError(event["error"]["message"], event["error"]["code"])
        self.first_token_seconds = event.get("first_token_seconds")

    async def cancel(self) -> None:
        """Stop the answer."""
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
        """The next event of these types; raises StreamingError for an error."""
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
