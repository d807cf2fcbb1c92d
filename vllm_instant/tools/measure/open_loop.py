"""An open loop: requests are sent when they are due, however slow the server is, and measured by token.

A closed loop (``closed_loop``) sends less to a slower server and so hides how long users would have waited. Here the
load does not depend on the server (no coordinated omission), and latencies count from when a request was due.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from vllm_instant.tools.measure.streaming_client import TIMEOUT_SECONDS, follow, open_client
from vllm_instant.tools.measure.token_stream import STREAM_OPTIONS, StreamedAnswer

Sleep = Callable[[float], Awaitable[None]]
_LEAD_SECONDS = 0.05
"""Time in which all senders are set up before the first request is due."""


@dataclass(frozen=True)
class OpenLoopRequest:
    """One request."""

    at: float
    """Seconds after the beginning."""
    body: Mapping[str, Any]
    """Of ``/v1/completions``; streaming is added."""
    kind: str = ""
    leave_after: int | None = None
    """Number of tokens after which the client hangs up."""


@dataclass
class OpenLoopResult(StreamedAnswer):
    """What became of one request; times in seconds since it was due."""

    due: float = 0.0
    """When it was due, in seconds after the beginning."""

    @property
    def late(self) -> float:
        """Delay of sending, because the sender was busy."""
        return self.sent


def send_open_loop(
    url: str, requests: Sequence[OpenLoopRequest], timeout: float = TIMEOUT_SECONDS
) -> list[OpenLoopResult]:
    """Send all requests when they are due and follow them to their ends; errors are noted with each, not raised."""
    return asyncio.run(_send(url, requests, timeout))


async def _send(url: str, requests: Sequence[OpenLoopRequest], timeout: float) -> list[OpenLoopResult]:
    async with open_client(url, timeout) as client:
        return await follow_all(client, requests, time.perf_counter() + _LEAD_SECONDS)


async def follow_all(
    client: httpx.AsyncClient,
    requests: Sequence[OpenLoopRequest],
    began: float,
    done: Callable[[OpenLoopResult], None] = lambda result: None,
    sleep: Sleep = asyncio.sleep,
) -> list[OpenLoopResult]:
    """Send all requests when they are due and follow them to their ends.

    Args:
        client: of the server.
        requests: what is sent.
        began: second 0 of the requests, by ``time.perf_counter``.
        done: called with each result as soon as its answer has ended.
        sleep: waits until a request is due.

    """

    async def one(request: OpenLoopRequest) -> OpenLoopResult:
        due = began + request.at
        await sleep(max(0.0, due - time.perf_counter()))
        answer = OpenLoopResult(request.kind, due=request.at)
        body = {"stream": True, "stream_options": STREAM_OPTIONS, **request.body}
        await follow(client, body, answer, leave_after=request.leave_after)
        result = answer.since(due)
        done(result)
        return result

    return list(await asyncio.gather(*map(one, requests)))
