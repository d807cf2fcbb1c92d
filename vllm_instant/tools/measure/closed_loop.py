"""A closed loop of streaming users against one server, measured by token.

Each user sends its next prompt when its answer is complete. Only tokens that arrive inside the measurement window
count, so that neither the start nor the end of the load distorts the result; answers still in progress when it closes
are abandoned.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from vllm_instant.tools.measure.streaming_client import follow, open_client
from vllm_instant.tools.measure.token_stream import StreamedAnswer, completion_body

MAX_WARM_UP_SECONDS = 20.0
"""The window opens after this time even if some user has not received a token."""
_LENGTH_STRIDE = 37
"""Coprime with usual ranges of answer lengths, so that neighbouring prompts have very different ones."""


@dataclass(frozen=True)
class PromptSpec:
    """One request's text and sampling."""

    text: str
    temperature: float = 0.0
    kind: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Added to the request body."""
    ignore_eos: bool = True
    """Continue answers that the model has ended, so that all have the same length. What a chat model writes behind
    its end repeats itself, which drafts guess well: prompts for such models set this to False."""

    def body(self, model: str, *, seed: int, max_tokens: int) -> dict[str, Any]:
        """A streamed request for an answer of ``max_tokens`` tokens, or fewer without ``ignore_eos``."""
        return completion_body(
            model,
            self.text,
            temperature=self.temperature,
            seed=seed,
            max_tokens=max_tokens,
            ignore_eos=self.ignore_eos,
            **self.extra,
        )


@dataclass
class ClosedLoopResult:
    """What one window measured; times in seconds."""

    seconds: float
    tokens: int = 0
    tokens_by_kind: dict[str, int] = field(default_factory=dict)
    gaps: list[tuple[float, int]] = field(default_factory=list)
    """``(time since the previous arrival, new tokens)``, first tokens excluded."""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """``(time since the window opened, new tokens)``, first tokens included."""
    ttft: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    opened_at: float = 0.0
    """When the window opened, by ``time.perf_counter``."""

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all users per second."""
        return self.tokens / self.seconds

    def speed_between(self, first: float, last: float) -> float:
        """Tokens per second in a part of the window, given in seconds since it opened."""
        return sum(tokens for when, tokens in self.arrivals if first <= when < last) / (last - first)

    def inter_token_latencies(self) -> np.ndarray:
        """One entry per token: tokens that arrive together share the time since the previous arrival."""
        tokens = np.array([tokens for _, tokens in self.gaps], int)
        return np.repeat(np.array([gap for gap, _ in self.gaps]) / np.maximum(tokens, 1), tokens)

    def add(self, answer: StreamedAnswer) -> None:
        """Count the tokens of an answer that arrived inside the window."""
        before, have = answer.sent, 0
        for now, total in answer.arrivals:
            new = total - have
            if self.opened_at <= now < self.opened_at + self.seconds:
                self.tokens += new
                self.arrivals.append((now - self.opened_at, new))
                self.tokens_by_kind[answer.kind] = self.tokens_by_kind.get(answer.kind, 0) + new
                if have == 0:
                    self.ttft.append(now - answer.sent)
                else:
                    self.gaps.append((now - before, new))
            before, have = now, total


@dataclass(frozen=True)
class _Load:
    """The requests of all users."""

    model: str
    prompts: Sequence[PromptSpec]
    concurrency: int
    max_tokens: tuple[int, int]
    first_prompt: int
    extra: Mapping[str, Any]

    def requests(self, user: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Kind and body of each request of one user, without end."""
        low, high = self.max_tokens
        number = self.first_prompt + user
        while True:
            prompt = self.prompts[number % len(self.prompts)]
            length = low + number * _LENGTH_STRIDE % (high - low + 1)
            yield prompt.kind, {**self.extra, **prompt.body(self.model, seed=number, max_tokens=length)}
            number += self.concurrency


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
    """Run ``concurrency`` users and measure ``seconds`` of their load.

    The window opens ``warm_up`` seconds after every user has received a first token: before that, the server mainly
    prefills prompts. After ``MAX_WARM_UP_SECONDS`` it opens in any case.

    User ``i`` sends prompts ``first_prompt + i``, ``first_prompt + i + concurrency``, … of the list, cyclically. Answer
    lengths lie between the two bounds of ``max_tokens``, by the number of the prompt: if all were equal, the users
    would synchronise, and a window would contain whole rounds of answers or none. ``extra`` is added to the body of
    every request.
    """
    load = _Load(model, prompts, concurrency, max_tokens, first_prompt, extra or {})
    return asyncio.run(_run(url, load, seconds, warm_up))


async def _run(url: str, load: _Load, seconds: float, warm_up: float) -> ClosedLoopResult:
    result = ClosedLoopResult(seconds)
    async with open_client(url, timeout=120, max_connections=load.concurrency) as client:
        answers: list[list[StreamedAnswer]] = [[] for _ in range(load.concurrency)]
        users = [asyncio.create_task(_user(client, load, user, answers[user])) for user in range(load.concurrency)]
        deadline = time.perf_counter() + MAX_WARM_UP_SECONDS
        while time.perf_counter() < deadline and not any(user.done() for user in users):
            if all(any(answer.arrivals for answer in own) for own in answers):
                break
            await asyncio.sleep(0.02)
        result.opened_at = time.perf_counter() + warm_up
        await asyncio.sleep(result.opened_at + seconds - time.perf_counter())
        for task in users:
            task.cancel()
        for outcome in await asyncio.gather(*users, return_exceptions=True):
            if isinstance(outcome, Exception):
                result.errors.append(f"{type(outcome).__name__}: {outcome}")
    for answer in (answer for own in answers for answer in own):
        result.add(answer)
        if answer.error is not None:
            result.errors.append(answer.error)
    return result


async def _user(client: httpx.AsyncClient, load: _Load, user: int, answers: list[StreamedAnswer]) -> None:
    """Send requests until cancelled or until one fails."""
    for kind, body in load.requests(user):
        answer = StreamedAnswer(kind)
        answers.append(answer)
        await follow(client, body, answer)
        if answer.error is not None:
            return
