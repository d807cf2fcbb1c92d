"""Requests that are sent when they are due, however slow the server is, each followed token by token.

A closed loop (``measure.closed_loop``) sends less to a slower server and so hides waiting times; here the
load does not depend on the server (no coordinated omission), and latencies count from when a request was due.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from vllm_instant.tools.measure.closed_loop import arrivals
from vllm_instant.tools.measure.interleaved_rounds import TOGETHER, TimedAnswer

_ID = re.compile(rb'"id":\s*"([^"]+)"')
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d+)')


@dataclass(frozen=True)
class OpenLoopRequest:
    """One request."""

    at: float
    """Seconds after the beginning."""
    body: Mapping[str, Any]
    """Of ``/v1/completions``; streaming is added."""
    kind: str = ""
    leave_after: int | None = None
    """Tokens after which the client hangs up."""


@dataclass
class OpenLoopResult:
    """What became of one request; times in seconds since it was due."""

    kind: str
    due: float
    late: float = 0.0
    """How late it was sent: the sender was busy."""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(when, tokens so far) for every event that brought tokens."""
    ended: float = float("nan")
    error: str | None = None
    id: str = ""
    """As the server calls it."""
    prompt_tokens: int | None = None
    left: bool = False
    """The client hung up on purpose."""

    @property
    def answer(self) -> TimedAnswer:
        """What came; an answer without any token has an error beside it."""
        return TimedAnswer(self.kind, self.arrivals)


def send_open_loop(url: str, requests: Sequence[OpenLoopRequest], timeout: float = 600.0) -> list[OpenLoopResult]:
    """Send all requests when they are due and follow them to their ends; errors are noted with each, not raised."""
    return asyncio.run(_send(url, requests, timeout))


async def follow_all(
    client: httpx.AsyncClient,
    requests: Sequence[OpenLoopRequest],
    began: float,
    done: Callable[[OpenLoopResult], None] = lambda followed: None,
) -> list[OpenLoopResult]:
    """Send all requests when they are due, ``began`` being second 0 on the clock of ``time.perf_counter``.

    ``done`` is handed each as soon as it has ended.
    """

    async def one(request: OpenLoopRequest) -> OpenLoopResult:
        followed = await _follow(client, request, began)
        done(followed)
        return followed

    return list(await asyncio.gather(*map(one, requests)))


def open_client(url: str, timeout: float = 600.0) -> httpx.AsyncClient:
    """A client without a limit of connections: were there one, requests would wait for each other."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits)


async def _send(url: str, requests: Sequence[OpenLoopRequest], timeout: float) -> list[OpenLoopResult]:
    async with open_client(url, timeout) as client:
        return await follow_all(client, requests, time.perf_counter() + 0.05)


async def _follow(client: httpx.AsyncClient, request: OpenLoopRequest, began: float) -> OpenLoopResult:
    due = began + request.at
    followed = OpenLoopResult(request.kind, request.at)
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    followed.late = time.perf_counter() - due
    body = {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **request.body,
    }
    have = 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                followed.error = f"HTTP {response.status_code}: {text[:300]}"
                return followed
            async for now, total, events in arrivals(response):
                if not have:
                    _note(followed, events)
                if total > have:
                    _add(followed.arrivals, now - due, total)
                    have = total
                if request.leave_after is not None and have >= request.leave_after:
                    followed.left = True
                    break
    except httpx.HTTPError as error:
        followed.error = f"{type(error).__name__}: {error}"
    if not have and followed.error is None:
        followed.error = "the answer ended without a token"
    followed.ended = time.perf_counter() - due
    return followed


def _note(followed: OpenLoopResult, events: bytes) -> None:
    if found := _ID.search(events):
        followed.id = found[1].decode()
    if found := _PROMPT_TOKENS.search(events):
        followed.prompt_tokens = int(found[1])


def _add(came: list[tuple[float, int]], when: float, total: int) -> None:
    """A sender that lags behind reads one event after the other, at once: they arrived together."""
    if came and when - came[-1][0] < TOGETHER:
        came[-1] = (came[-1][0], total)
    else:
        came.append((when, total))
