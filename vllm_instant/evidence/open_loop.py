"""Requests that are sent when they are due, however slow the server is, each followed token by token.

A closed loop (``evidence.load``) sends less to a slower server and so hides how long people would have waited; here the
load does not depend on the server (no coordinated omission), and latencies count from when a request was due.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from vllm_instant.evidence.load import arrivals
from vllm_instant.evidence.turns import Answer


@dataclass(frozen=True)
class Due:
    """One request."""

    at: float
    """Seconds after the beginning."""
    body: Mapping[str, Any]
    """Of ``/v1/completions``; streaming is added."""
    kind: str = ""


@dataclass
class Followed:
    """What became of one request; times in seconds since it was due."""

    kind: str
    due: float
    late: float = 0.0
    """How late it was sent: the sender was busy."""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(when, tokens so far) for every event that brought tokens."""
    ended: float = float("nan")
    error: str | None = None

    @property
    def answer(self) -> Answer:
        """What came; an answer without any token has an error beside it."""
        return Answer(self.kind, self.arrivals)


def send(url: str, requests: Sequence[Due], timeout: float = 600.0) -> list[Followed]:
    """Send all requests when they are due and follow them to their ends; errors are noted with each, not raised."""
    return asyncio.run(_send(url, requests, timeout))


async def _send(url: str, requests: Sequence[Due], timeout: float) -> list[Followed]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits) as client:
        began = time.perf_counter() + 0.05
        return list(await asyncio.gather(*(_follow(client, request, began) for request in requests)))


async def _follow(client: httpx.AsyncClient, request: Due, began: float) -> Followed:
    due = began + request.at
    followed = Followed(request.kind, request.at)
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
            async for now, total, _ in arrivals(response):
                if total > have:
                    have = total
                    followed.arrivals.append((now - due, total))
    except httpx.HTTPError as error:
        followed.error = f"{type(error).__name__}: {error}"
    if not have and followed.error is None:
        followed.error = "the answer ended without a token"
    followed.ended = time.perf_counter() - due
    return followed
