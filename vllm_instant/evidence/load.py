"""A closed loop of streaming users against one server, measured by token.

Each user sends the next prompt when its answer is complete. Only what arrives inside the measuring window counts, so
that neither the start nor the end of the load distorts it; answers that are under way when it closes are abandoned.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np

_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True)
class Prompt:
    """One request's text and sampling."""

    text: str
    temperature: float = 0.0
    kind: str = ""


@dataclass
class Measured:
    """What one window showed; times in seconds."""

    seconds: float
    tokens: int = 0
    tokens_by_kind: dict[str, int] = field(default_factory=dict)
    gaps: list[tuple[float, int]] = field(default_factory=list)
    """(time since the event before it, tokens that it brought), first tokens excluded."""
    ttft: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all users a second."""
        return self.tokens / self.seconds

    def inter_token_latencies(self) -> np.ndarray:
        """One entry a token: several tokens that arrive together share the time since the event before."""
        return np.repeat([gap / tokens for gap, tokens in self.gaps], [tokens for _, tokens in self.gaps])


def measure(
    url: str,
    model: str,
    prompts: Sequence[Prompt],
    *,
    concurrency: int,
    seconds: float,
    warm_up: float = 0.7,
    max_tokens: tuple[int, int] = (80, 128),
    first_prompt: int = 0,
) -> Measured:
    """Run ``concurrency`` users for ``warm_up + seconds`` and measure the last ``seconds``.

    User ``i`` sends prompts ``first_prompt + i``, ``first_prompt + i + concurrency``, … of the list, over and over.
    The lengths of the answers lie between the two bounds, by the number of the prompt: were they all the same, the
    users would fall into step with each other, and a window would see whole rounds of answers or none.
    """
    return asyncio.run(
        _measure(url, model, prompts, concurrency, seconds, warm_up, max_tokens, first_prompt),
    )


async def _measure(
    url: str,
    model: str,
    prompts: Sequence[Prompt],
    concurrency: int,
    seconds: float,
    warm_up: float,
    max_tokens: tuple[int, int],
    first_prompt: int,
) -> Measured:
    measured = Measured(seconds)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        opens = time.perf_counter() + warm_up
        closes = opens + seconds
        users = [
            asyncio.create_task(
                _user(client, model, prompts, first_prompt + i, concurrency, max_tokens, measured, opens, closes)
            )
            for i in range(concurrency)
        ]
        await asyncio.sleep(closes - time.perf_counter())
        for user in users:
            user.cancel()
        for outcome in await asyncio.gather(*users, return_exceptions=True):
            if isinstance(outcome, Exception):
                measured.errors.append(f"{type(outcome).__name__}: {outcome}")
    return measured


async def _user(
    client: httpx.AsyncClient,
    model: str,
    prompts: Sequence[Prompt],
    first: int,
    stride: int,
    max_tokens: tuple[int, int],
    measured: Measured,
    opens: float,
    closes: float,
) -> None:
    number = first
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
        }
        number += stride
        sent = before = time.perf_counter()
        have = 0
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise RuntimeError(f"HTTP {response.status_code}: {text[:300]}")
            async for chunk in response.aiter_raw():
                now = time.perf_counter()
                counts = _TOKENS.findall(chunk)
                if not counts or int(counts[-1]) <= have:
                    continue
                new = int(counts[-1]) - have
                if opens <= now < closes:
                    measured.tokens += new
                    measured.tokens_by_kind[prompt.kind] = measured.tokens_by_kind.get(prompt.kind, 0) + new
                    if have == 0:
                        measured.ttft.append(now - sent)
                    else:
                        measured.gaps.append((now - before, new))
                have += new
                before = now
