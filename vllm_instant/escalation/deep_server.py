"""The deep server: sends it a request, and passes its answer on byte by byte."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from vllm_instant.escalation.availability import Availability
from vllm_instant.interfaces.escalation import EscalationOptions

FORWARDED = "x-instant-escalated"
"""Header of requests that were escalated: a server that gets one answers it itself, so that none goes in a circle."""
_END_OF_STREAM = b"data: [DONE]"
_ERROR_EVENT = b'data: {"error"'
_PASSED_ON = frozenset({"content-type", "x-request-id", "openai-processing-ms"})
"""Headers of the deep answer that the client gets."""
_OPERATORS_FAULT = frozenset({401, 403, 404})
"""What a server answers to a wrong key or model name."""
_TEMPORARY = frozenset({408, 409, 425, 429})


class UnavailableError(Exception):
    """The deep server gives no answer; nothing was passed on, so that the fast answer can be given."""

    def __init__(self, kind: str, detail: str = "", is_known: bool = False) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.is_known = is_known
        """Whether an earlier request has found it out, and this one was not sent."""
        self.kind = kind
        """A few words for the client and the metrics: ``down``, ``slow``, ``wrong key``, ``status 500``, …"""


class CutError(Exception):
    """The deep answer ended before its end, after a part of it was passed on."""


@dataclass
class DeepAnswer:
    """An answer that has begun, or is complete."""

    status: int
    headers: dict[str, str]
    first: bytes
    """Its first part; all of it where it is not streamed."""
    rest: AsyncIterator[bytes]
    """Raises CutError where the answer is cut off."""
    close: Callable[[], Awaitable[None]]
    """To be called once nothing more of it is needed."""


class DeepServer:
    """Asks the server at ``deep_url``.

    Args:
        options: Of the plugin.
        clock: Time in seconds, for the circuit breaker.
        transport: How httpx sends; by default over the network.

    """

    def __init__(
        self, options: EscalationOptions, clock: Callable[[], float], transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._options = options
        self.availability = Availability(options.max_failures, options.retry_seconds, clock)
        base = str(options.deep_url).rstrip("/").removesuffix("/v1")
        timeout = httpx.Timeout(None, connect=options.connect_seconds)
        # Servers close idle connections after 2 seconds (gunicorn) or 5 (vLLM, and httpx by default): a request sent at
        # that moment would fail, though its server is well.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=1.0)
        self._client = httpx.AsyncClient(base_url=base, timeout=timeout, limits=limits, transport=transport)

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, path: str, body: Mapping[str, Any], request_id: str) -> DeepAnswer:
        """Send a request, and return its answer once its first part is there (all of it where it is not streamed).

        Raises:
            UnavailableError: There will be no answer.

        """
        if not self.availability.admits():
            raise UnavailableError("down", "left alone after failures", is_known=True)
        try:
            answer = await self._ask(path, body, request_id)
        except UnavailableError as error:
            # A refused request says nothing about the server, except that it is there.
            if error.kind == "refused":
                self.availability.succeeded()
            else:
                self.availability.failed()
            raise
        self.availability.succeeded()
        return answer

    async def _ask(self, path: str, body: Mapping[str, Any], request_id: str) -> DeepAnswer:
        options = self._options
        if options.deep_model is not None:
            body = {**body, "model": options.deep_model}
        headers = {"content-type": "application/json", "accept-encoding": "identity", FORWARDED: "1"}
        headers["x-request-id"] = request_id
        if key := os.environ.get(options.deep_key_variable):
            headers["authorization"] = f"Bearer {key}"
        request = self._client.build_request("POST", path, content=json.dumps(body).encode(), headers=headers)
        is_streamed = bool(body.get("stream"))
        response: httpx.Response | None = None
        try:
            async with asyncio.timeout(options.first_byte_seconds if is_streamed else options.answer_seconds):
                response = await self._client.send(request, stream=True)
                if response.status_code >= 300:
                    raise _refusal(response.status_code)
                chunks = response.aiter_raw()
                first = await anext(chunks, b"") if is_streamed else b"".join([chunk async for chunk in chunks])
            if not first:
                raise UnavailableError("cut", "an empty answer")
            if is_streamed and first.lstrip().startswith(_ERROR_EVENT):
                raise UnavailableError("error", "the stream begins with one")
            if not is_streamed:
                json.loads(first)
        except BaseException as error:
            if response is not None:
                await response.aclose()
            raise _unavailable(error) from None
        passed_on = {name: value for name, value in response.headers.items() if name in _PASSED_ON}
        rest = self._rest(chunks, first) if is_streamed else _nothing()
        return DeepAnswer(response.status_code, passed_on, first, rest, response.aclose)

    async def _rest(self, chunks: AsyncIterator[bytes], first: bytes) -> AsyncIterator[bytes]:
        """The parts of a stream behind the first one."""
        tail = first
        while True:
            try:
                async with asyncio.timeout(self._options.idle_seconds):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                break
            except (TimeoutError, httpx.HTTPError) as error:
                self.availability.failed()
                raise CutError(type(error).__name__) from None
            tail = (tail + chunk)[-64:]
            yield chunk
        if _END_OF_STREAM not in tail:
            self.availability.failed()
            raise CutError("no end of the stream")


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


def _refusal(status: int) -> UnavailableError:
    if status in (401, 403):
        return UnavailableError("wrong key", f"status {status}")
    if 400 <= status < 500 and status not in _OPERATORS_FAULT | _TEMPORARY:
        # A prompt that is too long there, or an option that it does not know; this server answers or refuses itself.
        return UnavailableError("refused", f"status {status}")
    return UnavailableError(f"status {status}")


def _unavailable(error: BaseException) -> BaseException:
    """What an exception means for the request; exceptions of other kinds are returned as they are."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
        return UnavailableError("down", type(error).__name__)
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return UnavailableError("slow", "no answer in time")
    if isinstance(error, httpx.HTTPError | ValueError):
        return UnavailableError("cut", type(error).__name__)
    return error
