"""Turns: the same work to one server after the other, in random order, every answer to its end.

A turn is a fixed list of prompts that a number of users send through one server. So every arm of a round does the same
work, and rounds can be compared in pairs. Between turns the machine settles: the servers that are not asked are idle.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx
import numpy as np

from vllm_instant.tools.measure.closed_loop import PromptSpec, arrivals
from vllm_instant.tools.measure.sampling import RefusedError, ServerClient
from vllm_instant.tools.measure.servers import settle

_ACCEPTED = re.compile(rb'"num_accepted_draft_tokens":\s*(\d+)')
SECONDS = 600.0
"""After which an answer that has stopped coming is an error."""
TOGETHER = 0.001
"""Seconds within which events count as one arrival: a reader that lags behind sees one after the other, at once."""


@dataclass(frozen=True)
class TimedAnswer:
    """One answer; times in seconds since its request was sent."""

    kind: str
    arrivals: list[tuple[float, int]]
    """``(time, tokens so far)`` for everything that arrived together."""
    accepted: int | None = None
    """Draft tokens in it; None where the server does not say."""

    @property
    def tokens(self) -> int:
        """Of the whole answer."""
        return self.arrivals[-1][1]

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.arrivals[0][0]

    def seconds_to(self, tokens: int) -> float:
        """Time until so many tokens were there; NaN if the answer is shorter."""
        return next((when for when, so_far in self.arrivals if so_far >= tokens), float("nan"))

    def inter_token_latencies(self) -> np.ndarray:
        """One entry a token after the first event; tokens that arrive together share the time since the one before."""
        times = np.array([when for when, _ in self.arrivals])
        tokens = np.diff([so_far for _, so_far in self.arrivals])
        return np.repeat(np.diff(times) / tokens, tokens)


@dataclass(frozen=True)
class ArmRound:
    """What one arm did with one list of prompts."""

    seconds: float
    """From the first request to the last token."""
    answers: list[TimedAnswer]
    joules: float | None = None
    """Energy of the machine meanwhile; None where it cannot tell."""

    @property
    def tokens(self) -> int:
        """Output tokens of all answers."""
        return sum(answer.tokens for answer in self.answers)

    def plain(self) -> dict[str, Any]:
        """As JSON types; times to a hundredth of a millisecond."""
        answers = [
            [answer.kind, answer.accepted, [[round(when, 5), tokens] for when, tokens in answer.arrivals]]
            for answer in self.answers
        ]
        return {"seconds": self.seconds, "joules": self.joules, "answers": answers}

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Self:
        """The turn that ``plain`` was made from."""
        answers = [
            TimedAnswer(kind, [(when, tokens) for when, tokens in came], accepted)
            for kind, accepted, came in plain["answers"]
        ]
        return cls(plain["seconds"], answers, plain["joules"])


def interleaved(arms: Sequence[str], rounds: Iterable[int], order: random.Random) -> Iterator[tuple[int, str]]:
    """``(round, arm)`` for all arms of each round in random order; the machine has settled when one is handed out."""
    for number in rounds:
        for arm in order.sample(list(arms), len(arms)):
            settle()
            yield number, arm


def run_arm_round(
    arm: ServerClient,
    prompts: Sequence[PromptSpec],
    *,
    concurrency: int,
    tokens: int,
    seed: int = 0,
    energy: Callable[[], float | None] = lambda: None,
) -> ArmRound:
    """Send every prompt once, ``concurrency`` at a time; each answer has ``tokens`` tokens.

    Args:
        arm: the server.
        prompts: what is asked.
        concurrency: users; each sends the next prompt when its answer is complete.
        tokens: length of the answers.
        seed: of the first prompt's sampling; the following ones count up.
        energy: joules that the machine has used so far, or None.

    Raises:
        RefusedError: when the server does not answer as it should.

    """
    before = energy()
    seconds, answers = asyncio.run(_all(arm, prompts, concurrency, tokens, seed))
    after = energy()
    return ArmRound(seconds, answers, None if before is None or after is None else after - before)


async def _all(
    arm: ServerClient, prompts: Sequence[PromptSpec], concurrency: int, tokens: int, seed: int
) -> tuple[float, list[TimedAnswer]]:
    waiting = iter(enumerate(prompts))
    answers: dict[int, TimedAnswer] = {}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=arm.url, timeout=SECONDS, limits=limits, headers=arm.headers) as client:

        async def user() -> None:
            for number, prompt in waiting:
                answers[number] = await _ask(client, arm, prompt, tokens, seed + number)

        started = time.perf_counter()
        try:
            await asyncio.gather(*(user() for _ in range(concurrency)))
        except httpx.HTTPError as error:
            raise RefusedError(f"{arm.url} does not answer: {error or type(error).__name__}") from None
        return time.perf_counter() - started, [answers[number] for number in sorted(answers)]


async def _ask(client: httpx.AsyncClient, arm: ServerClient, prompt: PromptSpec, tokens: int, seed: int) -> TimedAnswer:
    body = {
        "model": arm.model,
        "prompt": prompt.text,
        "temperature": prompt.temperature,
        "seed": seed,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **prompt.extra,
    }
    came: list[tuple[float, int]] = []
    accepted = None
    sent = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise RefusedError(f"{arm.url} refused a request ({response.status_code}): {text[:300]}")
        async for now, total, events in arrivals(response):
            if total > (came[-1][1] if came else 0):
                if came and now - sent - came[-1][0] < TOGETHER:
                    came[-1] = (came[-1][0], total)
                else:
                    came.append((now - sent, total))
            if found := _ACCEPTED.findall(events):
                accepted = int(found[-1])
    if not came:
        raise RefusedError(f"{arm.url} ended an answer without a token")
    return TimedAnswer(prompt.kind, came, accepted)
