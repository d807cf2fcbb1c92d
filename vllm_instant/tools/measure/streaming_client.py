"""Streams answers with httpx and measures them by token: the client of the closed loop, the open loop and bench."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from vllm_instant.escalation.requests import ANSWERED_BY
from vllm_instant.tools.measure.http_client import async_client
from vllm_instant.tools.measure.token_stream import StreamedAnswer, StreamError, TokenStream, completion_body

TIMEOUT_SECONDS = 600.0
"""Time without data after which an answer counts as failed."""


def open_client(
    url: str,
    timeout: float = TIMEOUT_SECONDS,
    max_connections: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> httpx.AsyncClient:
    """A client for streams; without ``max_connections`` no request waits for another one's connection."""
    return async_client(url, max_connections=max_connections, timeout=timeout, headers=dict(headers or {}))


async def follow(
    client: httpx.AsyncClient,
    body: Mapping[str, Any],
    answer: StreamedAnswer,
    *,
    path: str = "/v1/completions",
    leave_after: int | None = None,
) -> None:
    """Send a request and fill ``answer`` while its tokens arrive, by ``time.perf_counter``.

    A failure is noted in ``answer.error``, not raised. A caller that is cancelled keeps what has arrived.

    Args:
        client: of the server, see ``open_client``.
        body: of the request.
        answer: is filled.
        path: of the route.
        leave_after: number of tokens after which the client hangs up.

    """
    stream = TokenStream(answer)
    answer.sent = time.perf_counter()
    try:
        async with client.stream("POST", path, json=dict(body)) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise StreamError(f"HTTP {response.status_code}: {text[:300]}")
            answer.answered_by = response.headers.get(ANSWERED_BY, "")
            async for chunk in response.aiter_raw():
                tokens = stream.feed(chunk, time.perf_counter())
                if leave_after is not None and tokens >= leave_after:
                    answer.left = True
                    return
        stream.end()
    except StreamError as error:
        answer.error = str(error)
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        answer.ended = time.perf_counter()


def stream_completion(
    client: httpx.Client, model: str, prompt: str, on_text: Callable[[str], None] | None = None, **sampling: Any
) -> StreamedAnswer:
    """Send one completion and follow its stream to the end; times are seconds since the request was sent.

    Args:
        client: of the server, see ``http_client.sync_client``.
        model: served model name.
        prompt: the prompt.
        on_text: called with each piece of text as it arrives.
        **sampling: further parameters of the request.

    Raises:
        StreamError: when the server refuses or breaks off.

    """
    answer = StreamedAnswer()
    stream = TokenStream(answer, on_text or (lambda text: None))
    answer.sent = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=completion_body(model, prompt, **sampling)) as response:
        if response.status_code != 200:
            raise StreamError(f"HTTP {response.status_code}: {response.read().decode(errors='replace')[:300]}")
        for chunk in response.iter_raw():
            stream.feed(chunk, time.perf_counter())
    stream.end()
    answer.ended = time.perf_counter()
    return answer.since(answer.sent)
