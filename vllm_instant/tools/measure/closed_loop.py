"""A closed loop of streaming users against one server, measured by token.

Each user sends the next prompt when its answer is complete. Only what arrives inside the measuring window counts, so
that neither the start nor the end of the load distorts it; answers that are under way when it closes are abandoned.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

MAX_WARM_UP = 20.0
"""Seconds after which a window opens even if some user has not got a token."""
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True)
class PromptSpec:
    """One request's text and sampling."""

    text: str
    temperature: float = 0.0
    kind: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Added to the body of the request."""


@dataclass
class ClosedLoopResult:
    """What one window showed; times in seconds."""

    seconds: float
    tokens: int = 0
    tokens_by_kind: dict[str, int] = field(default_factory=dict)
    gaps: list[tuple[float, int]] = field(default_factory=list)
    """(time since the event before it, tokens that it brought), first tokens excluded."""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(time since the window opened, tokens that arrived then), first tokens included."""
    ttft: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    opened_at: float = 0.0
    """When the window opened, on the clock of ``time.perf_counter``."""

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all users a second."""
        return self.tokens / self.seconds

    def speed_between(self, first: float, last: float) -> float:
        """Tokens a second of a part of the window, given in seconds since it opened."""
        return sum(tokens for when, tokens in self.arrivals if first <= when < last) / (last - first)

    def inter_token_latencies(self) -> np.ndarray:
        """One entry a token: several tokens that arrive together share the time since the event before."""
        tokens = np.array([tokens for _, tokens in self.gaps], int)
        return np.repeat(np.array([gap for gap, _ in self.gaps]) / np.maximum(tokens, 1), tokens)


def run_closed_loop(
    url: str,
    model: str,
    prompts: Sequence[PromptSpec],
    *,
    concurrency: int,
    seconds: float,
    warm_up: float = 0.3,
    max_tokens: tuple[int, int] = (80, 128),
    first_prompt: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> ClosedLoopResult:
    """Run ``concurrency`` users and measure ``seconds`` of it.

    The window opens ``warm_up`` seconds after every user has got a first token: before that, the server only reads
    prompts (after ``MAX_WARM_UP`` it opens in any case).

    User ``i`` sends prompts ``first_prompt + i``, ``first_prompt + i + concurrency``, … of the list, over and over.
    The lengths of the answers lie between the two bounds, by the number of the prompt: were they all the same, the
    users would fall into step with each other, and a window would see whole rounds of answers or none. ``extra`` is
    added to the body of every request.
    """
    return asyncio.run(
        _measure(url, model, prompts, concurrency, seconds, warm_up, max_tokens, first_prompt, extra or {}),
    )


async def _measure(
    url: str,
    model: str,
    prompts: Sequence[PromptSpec],
    concurrency: int,
    seconds: float,
    warm_up: float,
    max_tokens: tuple[int, int],
    first_prompt: int,
    extra: Mapping[str, Any],
) -> ClosedLoopResult:
    measured = ClosedLoopResult(seconds)
    window = _Window()
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        users = [
            asyncio.create_task(
                _user(client, model, prompts, first_prompt + i, concurrency, max_tokens, measured, window, extra)
            )
            for i in range(concurrency)
        ]
        deadline = time.perf_counter() + MAX_WARM_UP
        while window.begun < concurrency and time.perf_counter() < deadline and not any(u.done() for u in users):
            await asyncio.sleep(0.02)
        window.opens = time.perf_counter() + warm_up
        window.closes = window.opens + seconds
        await asyncio.sleep(window.closes - time.perf_counter())
        for user in users:
            user.cancel()
        for outcome in await asyncio.gather(*users, return_exceptions=True):
            if isinstance(outcome, Exception):
                measured.errors.append(f"{type(outcome).__name__}: {outcome}")
    measured.opened_at = window.opens
    return measured


@dataclass
class _Window:
    begun: int = 0
    """Users that got a first token."""
    opens: float = math.inf
    closes: float = math.inf


async def _user(
    client: httpx.AsyncClient,
    model: str,
    prompts: Sequence[PromptSpec],
    first: int,
    stride: int,
    max_tokens: tuple[int, int],
    measured: ClosedLoopResult,
    window: _Window,
    extra: Mapping[str, Any],
) -> None:
    number = first
    begun = False
    while True:
        prompt = prompts[number % len(prompts)]
        body = {
            "model": model,
            "prompt": prompt.text,
            "temperature": prompt.temperature,
            "seed": number,
            "max_tokens": max_tokens[0] + number * 37 % (max_tokens[1] - max_tokens[0] + 1),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **extra,
            **prompt.extra,
        }
        number += stride
        sent = before = time.perf_counter()
        have = 0
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise RuntimeError(f"HTTP {response.status_code}: {text[:300]}")
            async for now, total, _ in arrivals(response):
                if total <= have:
                    continue
                new = total - have
                if not begun:
                    begun = True
                    window.begun += 1
                if window.opens <= now < window.closes:
                    measured.tokens += new
                    measured.arrivals.append((now - window.opens, new))
                    measured.tokens_by_kind[prompt.kind] = measured.tokens_by_kind.get(prompt.kind, 0) + new
                    if have == 0:
                        measured.ttft.append(now - sent)
                    else:
                        measured.gaps.append((now - before, new))
                have = total
                before = now


async def arrivals(response: httpx.Response) -> AsyncIterator[tuple[float, int, bytes]]:
    """What arrives together of a stream that was asked for ``continuous_usage_stats``.

    Yields:
        When it arrived (``time.perf_counter``), how many tokens the answer then has (0 if it does not say), and the
        text of the events.

    """
    rest = b""
    async for chunk in response.aiter_raw():
        now = time.perf_counter()
        whole, _, rest = (rest + chunk).rpartition(b"\n")
        counts = _TOKENS.findall(whole)
        yield now, int(counts[-1]) if counts else 0, whole
