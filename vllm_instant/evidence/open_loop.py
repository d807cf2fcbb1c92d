"""Requests that are sent when they are due, however slow the server is, each followed token by token.

A closed loop (``evidence.load``) sends less to a slower server and so hides how long people would have waited; here the
load does not depend on the server (no coordinated omission), and latencies count from when a request was due.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


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
    def ttft(self) -> float:
        """Time to the first token; NaN if none came."""
        return self.arrivals[0][0] if self.arrivals else float("nan")

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        return self.arrivals[-1][1] if self.arrivals else 0

    def gaps(self) -> npt.NDArray[np.float64]:
        """Inter-token latencies, one a token: those that arrive together share the time since the event before."""
        if len(self.arrivals) < 2:
            return np.zeros(0)
        when, tokens = np.array([a[0] for a in self.arrivals]), np.array([a[1] for a in self.arrivals])
        new = np.diff(tokens)
        return np.repeat(np.diff(when) / new, new)


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
            async for chunk in response.aiter_raw():
                counts = _TOKENS.findall(chunk)
                if counts and int(counts[-1]) > have:
                    have = int(counts[-1])
                    followed.arrivals.append((time.perf_counter() - due, have))
    except httpx.HTTPError as error:
        followed.error = f"{type(error).__name__}: {error}"
    followed.ended = time.perf_counter() - due
    return followed
