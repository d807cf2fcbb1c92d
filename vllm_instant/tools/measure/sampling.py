"""Samples and answers of servers for the same requests: the measurements of ``vllm-instant verify``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from vllm_instant.speculation.draft_budget import CLIENT_KEY
from vllm_instant.tools.measure.distribution_test import Agreement, Tokens, compare_draws
from vllm_instant.tools.measure.http_client import async_client, get
from vllm_instant.tools.measure.server_metrics import ACCEPTED, DRAFTED, metric_totals

COMPLETIONS = 50
"""Number of samples per request."""
IN_FLIGHT = 4
"""Number of concurrent requests."""

PROMPTS = (
    "import os\nimport sys\n\ndef main(",
    "for i in range(len(items)):\n    if items[i]",
    '{"name": "copy", "kind": "function", "args": ["src", "dst"], "doc": "',
    "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n        self.",
    "The name of the file is the name of the file. The name of the file is",
    "one two three one two three one two three one two",
)
"""Beginnings that leave the model both certain and uncertain tokens."""


@dataclass(frozen=True)
class SamplingSetting:
    """One set of sampling parameters."""

    name: str
    parameters: dict[str, Any]


SETTINGS = (
    SamplingSetting("temperature 1.0", {"temperature": 1.0}),
    SamplingSetting("temperature 0.7, top-p 0.95", {"temperature": 0.7, "top_p": 0.95}),
    SamplingSetting("temperature 1.0, top-p 0.9, top-k 50", {"temperature": 1.0, "top_p": 0.9, "top_k": 50}),
    SamplingSetting(
        "temperature 0.9, penalties",
        {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    ),
)


@dataclass
class ServerClient:
    """A server with what every request to it needs.

    Args:
        url: its address, without ``/v1``.
        model: the model name in requests.
        draft_length: number of draft tokens that each request asks for; None leaves it to the server's policy.
        headers: of all requests.

    """

    url: str
    model: str
    draft_length: int | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self, prompt: str, **parameters: Any) -> dict[str, Any]:
        """The body of a request for a completion."""
        body = {"model": self.model, "prompt": prompt, "ignore_eos": True, "return_token_ids": True, **parameters}
        if self.draft_length is not None:
            body["vllm_xargs"] = {CLIENT_KEY: self.draft_length}
        return body

    def totals(self) -> tuple[float, float]:
        """Draft tokens verified and accepted so far."""
        page = get(self.url, "/metrics", timeout=30, headers=self.headers).text
        found = metric_totals(page, (DRAFTED, ACCEPTED))
        return found.get(DRAFTED, 0.0), found.get(ACCEPTED, 0.0)


@dataclass(frozen=True)
class SamplingResult:
    """The result for one set of sampling parameters."""

    setting: SamplingSetting
    agreement: Agreement
    drafted: int
    """Draft tokens that the arm verified meanwhile."""
    accepted: int

    @property
    def conclusive(self) -> bool:
        """Whether enough drafts were accepted and rejected to exercise every part of a sampler."""
        return self.accepted >= 50 and self.drafted - self.accepted >= 50


class RefusedError(RuntimeError):
    """A server did not answer a request as it should; the message quotes it."""


async def _completions(
    arm: ServerClient, bodies: Sequence[dict[str, Any]], tick: Callable[[], None], route: str, in_flight: int
) -> list[list[dict[str, Any]]]:
    gate = asyncio.Semaphore(in_flight)
    async with async_client(arm.url, timeout=600, headers=arm.headers) as client:

        async def one(body: dict[str, Any]) -> list[dict[str, Any]]:
            async with gate:
                try:
                    response = await client.post(route, json=body)
                except httpx.HTTPError as error:
                    raise RefusedError(f"{arm.url} does not answer: {error or type(error).__name__}") from None
            if response.status_code != 200:
                raise RefusedError(f"{arm.url} refused a request ({response.status_code}): {response.text[:300]}")
            tick()
            choices: list[dict[str, Any]] = response.json()["choices"]
            return choices

        return await asyncio.gather(*(one(body) for body in bodies))


def complete(
    arm: ServerClient,
    bodies: Sequence[dict[str, Any]],
    tick: Callable[[], None] = lambda: None,
    route: str = "/v1/completions",
    in_flight: int = IN_FLIGHT,
) -> list[list[dict[str, Any]]]:
    """The choices of each request, ``in_flight`` at a time; raises RefusedError. ``tick`` is called after each."""
    return asyncio.run(_completions(arm, bodies, tick, route, in_flight))


def draw_samples(
    arm: ServerClient,
    prompts: Sequence[str],
    parameters: dict[str, Any],
    count: int,
    tokens: int,
    tick: Callable[[], None] = lambda: None,
) -> list[Tokens]:
    """``count`` independent samples of ``tokens`` tokens after each prompt, int64 ``[count, tokens]`` per prompt."""
    sizes = [COMPLETIONS] * (count // COMPLETIONS) + ([count % COMPLETIONS] if count % COMPLETIONS else [])
    bodies = [arm.body(prompt, n=size, max_tokens=tokens, **parameters) for size in sizes for prompt in prompts]
    answers = complete(arm, bodies, tick)
    drawn: list[list[list[int]]] = [[] for _ in prompts]
    for number, choices in enumerate(answers):
        drawn[number % len(prompts)].extend(choice["token_ids"][:tokens] for choice in choices)
    return [np.array(rows, np.int64) for rows in drawn]


def greedy_answers(arm: ServerClient, prompts: Sequence[str], tokens: int) -> list[list[int]]:
    """The token ids of each prompt's greedy answer."""
    bodies = [arm.body(prompt, temperature=0, max_tokens=tokens) for prompt in prompts]
    return [choices[0]["token_ids"] for choices in complete(arm, bodies)]


def seeded_answers(arm: ServerClient, prompts: Sequence[str], tokens: int) -> list[list[int]]:
    """The token ids of one sampled answer per prompt, each with a seed."""
    bodies = [arm.body(prompt, temperature=1.0, seed=seed, max_tokens=tokens) for seed, prompt in enumerate(prompts)]
    return [choices[0]["token_ids"] for choices in complete(arm, bodies)]


def sampled(
    arm: ServerClient,
    expected: Sequence[Tokens],
    prompts: Sequence[str],
    setting: SamplingSetting,
    false_alarms: float,
    tick: Callable[[], None] = lambda: None,
) -> SamplingResult:
    """Draw as many samples as ``expected`` has, and compare."""
    count, tokens = expected[0].shape
    drafted, accepted = arm.totals()
    drawn = draw_samples(arm, prompts, setting.parameters, count, tokens, tick)
    drafted_then, accepted_then = arm.totals()
    return SamplingResult(
        setting,
        compare_draws(drawn, expected, false_alarms=false_alarms),
        int(drafted_then - drafted),
        int(accepted_then - accepted),
    )
