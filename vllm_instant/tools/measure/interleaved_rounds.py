"""Interleaved rounds: every arm does the same work, one after the other in random order, each answer to its end.

In one round each arm gets the same list of prompts from the same number of users, so rounds can be compared in pairs.
Between two arms the machine settles: the servers that are not asked are idle.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.sampling import RefusedError, ServerClient
from vllm_instant.tools.measure.servers import settle
from vllm_instant.tools.measure.streaming_client import follow, open_client
from vllm_instant.tools.measure.token_stream import StreamedAnswer


@dataclass(frozen=True)
class ArmRound:
    """What one arm did with one list of prompts."""

    seconds: float
    """From the first request to the last token."""
    answers: list[StreamedAnswer]
    """Times in seconds since each request was sent."""
    joules: float | None = None
    """Energy of the machine during the round; None where it is not measured."""

    @property
    def tokens(self) -> int:
        """Output tokens of all answers."""
        return sum(answer.tokens for answer in self.answers)

    def plain(self) -> dict[str, Any]:
        """The round as JSON types, times to a hundredth of a millisecond."""
        answers = [
            [
                answer.kind,
                answer.accepted,
                [[round(when, 5), tokens] for when, tokens in answer.arrivals],
                *([answer.answered_by] if answer.answered_by else []),
            ]
            for answer in self.answers
        ]
        return {"seconds": self.seconds, "joules": self.joules, "answers": answers}

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Self:
        """The round that ``plain`` describes."""
        answers = [
            StreamedAnswer(
                kind, [(when, tokens) for when, tokens in arrivals], accepted, answered_by=by[0] if by else ""
            )
            for kind, accepted, arrivals, *by in plain["answers"]
        ]
        return cls(plain["seconds"], answers, plain["joules"])


def interleaved(arms: Sequence[str], rounds: Iterable[int], order: random.Random) -> Iterator[tuple[int, str]]:
    """``(round, arm)`` for all arms of each round in random order; waits for the machine to settle before each."""
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
        prompts: of the round.
        concurrency: number of users; each sends the next prompt when its answer is complete.
        tokens: length of the answers.
        seed: of the first prompt's sampling; the following ones count up.
        energy: returns the joules that the machine has used so far, or None.

    Raises:
        RefusedError: when the server does not answer as it should.

    """
    before = energy()
    seconds, answers = asyncio.run(_run(arm, prompts, concurrency, tokens, seed))
    after = energy()
    return ArmRound(seconds, answers, None if before is None or after is None else after - before)


async def _run(
    arm: ServerClient, prompts: Sequence[PromptSpec], concurrency: int, tokens: int, seed: int
) -> tuple[float, list[StreamedAnswer]]:
    waiting = iter(enumerate(prompts))
    answers: dict[int, StreamedAnswer] = {}
    async with open_client(arm.url, max_connections=concurrency, headers=arm.headers) as client:

        async def user() -> None:
            for number, prompt in waiting:
                answer = StreamedAnswer(prompt.kind)
                await follow(client, prompt.body(arm.model, seed=seed + number, max_tokens=tokens), answer)
                if answer.error is not None:
                    raise RefusedError(f"{arm.url} did not answer a request as it should: {answer.error}")
                answers[number] = answer.since(answer.sent)

        started = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(concurrency)))
        return time.perf_counter() - started, [answers[number] for number in sorted(answers)]
