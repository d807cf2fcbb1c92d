"""A soak: mixed traffic at a low rate for hours, and whether memory, descriptors, tasks or threads of a server grow.

A round of requests runs every half minute: completions whose answers are known, prompts that never come again,
streaming sessions with edits, structured output, session tokens, two of the faults of ``chaos_faults``, and a reset of
the prefix cache; before each reading, the weights are loaded again. Readings are taken while no request runs.

A quantity is flat if the upper end of the 95 % interval of its slope (least squares over the readings after the
warm-up, in which caches fill and the allocator reaches its size) is below a limit that was fixed beforehand: 1 % of the
memory per hour, and half a descriptor, thread or task per hour.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import task_count
from chaos_faults import FAULTS, PATIENCE, UnacceptableError
from chaos_server import HEADERS, KEY, Target, server_of
from scipy import stats

from vllm_instant.streaming.client import StreamingError, StreamingSession
from vllm_instant.tools.measure.http_client import async_client
from vllm_instant.tools.measure.prompts import snippets
from vllm_instant.tools.measure.server_metrics import metric_totals

ROUND_SECONDS, READING_SECONDS, WARM_UP_SECONDS, REST_SECONDS = 30.0, 300.0, 900.0, 15.0
MEMORY_LIMIT, COUNT_LIMIT = 0.01, 0.5
"""Per hour: share of the memory, and number."""
TOKENS, SHAPES, WORDS = 24, 200, 12_000
PATTERNS = ["[a-z]{3,6}[0-9]", "(yes|no|maybe)", "[A-Z][a-z]{2,8} [0-9]{2}", '\\{"a": [0-9]{1,4}\\}']
ROLES = {"vllm": "API server", "VLLM::EngineCore": "engine core", "VLLM::Worker": "worker", "python": "process guard"}
ABUSES = (
    "client leaves",
    "session dropped",
    "odd session events",
    "odd vllm_xargs",
    "odd sampling",
    "diagnostics",
    "no HTTP",
    "slow writer",
    "flood of edits",
)


@dataclass
class Soak:
    """What the rounds share."""

    target: Target
    choose: random.Random
    expected: dict[str, str] = field(default_factory=dict)
    """Prompts and their answers at the start."""
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def post(self, path: str, body: Any) -> Any:
        """The JSON of a successful answer; other answers raise ``httpx.HTTPError``."""
        response = await self.target.client.post(path, json=body, timeout=PATIENCE * 10)
        response.raise_for_status()
        return response.json() if response.content else None

    async def complete(self, prompt: str, **parameters: Any) -> str:
        """The text of one completion, greedy by default."""
        body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **parameters}
        text: str = (await self.post("/v1/completions", body))["choices"][0]["text"]
        return text

    async def attempt(self, name: str, activity: Awaitable[None]) -> None:
        """Run and count one activity."""
        try:
            await asyncio.wait_for(activity, PATIENCE * 10)
        except (UnacceptableError, StreamingError, TimeoutError, OSError, httpx.HTTPError) as error:
            self.wrong.append(f"{name}: {type(error).__name__} {error}"[:300])
        self.done[name] += 1


async def known_answer(soak: Soak) -> None:
    """A prompt is answered as at the start."""
    prompt = soak.choose.choice(list(soak.expected))
    if await soak.complete(prompt) != soak.expected[prompt]:
        raise UnacceptableError(f"another answer to {prompt[:40]!r}")


async def new_prompt(soak: Soak) -> None:
    """A text that never comes again, sampled, with log-probabilities."""
    words = " ".join(f"{soak.choose.getrandbits(20):x}" for _ in range(40))
    await soak.complete(words, temperature=1.0, seed=soak.choose.getrandbits(30), logprobs=2)


async def typed_prompt(soak: Soak) -> None:
    """A streaming session with an edit answers as the whole prompt does, and is then asked a second time and left."""
    prompt = soak.choose.choice(list(soak.expected))[:200]
    body: dict[str, Any] = {"model": "demo", "max_tokens": TOKENS, "temperature": 0}
    whole = await soak.post("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]})
    async with StreamingSession(soak.target.url, api_key=KEY, **body) as session:
        await session.append(prompt[:100] + " and so on")
        await asyncio.sleep(0.2)
        await session.replace(100, None, prompt[100:])
        parts = [part["choices"][0]["delta"].get("content") or "" async for part in session.commit() if part["choices"]]
        if "".join(parts) != whole["choices"][0]["message"]["content"]:
            raise UnacceptableError(f"another answer to the typed prompt {prompt[:40]!r}")
        await session.append("And then?")
        async for _ in session.commit():
            break


async def structured_answer(soak: Soak) -> None:
    """An answer has the form that was asked for."""
    pattern = soak.choose.choice(PATTERNS)
    text = await soak.complete("Answer: ", structured_outputs={"regex": pattern})
    if not re.fullmatch(pattern, text):
        raise UnacceptableError(f"{text!r} is no {pattern}")


async def refused_request(soak: Soak) -> None:
    """Mistakes get an answer of the kind 4xx."""
    for body in ({"model": "another", "prompt": "x"}, {"model": "demo", "prompt": "x", "top_p": 7}):
        response = await soak.target.client.post("/v1/completions", json=body, timeout=PATIENCE * 10)
        if not 400 <= response.status_code < 500:
            raise UnacceptableError(f"{body}: HTTP {response.status_code}")


async def session_token(soak: Soak) -> None:
    """A token is created, and the session that it opens is closed."""
    token = (await soak.post("/v1/instant/tokens", {"seconds": 20}))["token"]
    async with StreamingSession(soak.target.url, token=token, model="demo") as session:
        await session.append("Once upon a time")


async def prefix_cache_reset(soak: Soak) -> None:
    """The prefix cache is emptied."""
    await soak.post("/reset_prefix_cache", None)


async def weights_loaded_again(soak: Soak) -> None:
    """The weights are read from disk again."""
    await soak.post("/collective_rpc", {"method": "reload_weights"})


async def every_shape(soak: Soak) -> None:
    """Prompts of each length once: oneDNN keeps a kernel for each of up to 128 numbers of tokens per layer.

    Chance would meet these lengths over hours, and the worker's memory would grow as long.
    """
    for tokens in range(1, SHAPES + 1):
        prompt = [soak.choose.randrange(100, 4000) for _ in range(tokens)]
        await soak.post("/v1/completions", {"model": "demo", "prompt": prompt, "max_tokens": 1})


async def every_word(soak: Soak) -> None:
    """More words than the tokenizer keeps: it remembers the tokens of the first 10,000 that it meets.

    Random prompts would meet as many over hours, and the API server's memory would grow as long, as it does without us.
    """
    words = ["".join(letters) for letters in itertools.product("aeioubdgklmnprst", repeat=4)][:WORDS]
    for first in range(0, WORDS, 200):
        await soak.complete(" ".join(words[first : first + 200]), max_tokens=1)


ACTIVITIES = (
    known_answer,
    known_answer,
    new_prompt,
    typed_prompt,
    structured_answer,
    refused_request,
    session_token,
    prefix_cache_reset,
)


async def one_round(soak: Soak) -> None:
    """All activities, and two faults, at once."""
    abuses = soak.choose.sample(ABUSES, 2)
    await asyncio.gather(
        *(soak.attempt(activity.__name__, activity(soak)) for activity in ACTIVITIES),
        *(soak.attempt(name, FAULTS[name](soak.target, soak.choose)) for name in abuses),
    )
    if soak.choose.random() < 0.2:
        # Alone: it uses up the client's limit of sessions.
        await soak.attempt("too many sessions", FAULTS["too many sessions"](soak.target, soak.choose))


async def reading(soak: Soak, seconds: float) -> dict[str, float]:
    """What each process and the event loop hold now.

    Memory is what only this process has, in main memory or swapped out: pages of shared files are not counted.
    """
    found: Counter[str] = Counter()
    for process in soak.target.family:
        with process.oneshot():
            memory = process.memory_full_info()
            role = ROLES.get(process.name(), process.name())
            found[f"{role}: memory, MiB"] += round((memory.uss + memory.swap) / 2**20, 2)
            found[f"{role}: descriptors"] += process.num_fds()
            found[f"{role}: threads"] += process.num_threads()
    inside = (await soak.target.client.get(task_count.PATH, timeout=PATIENCE * 10)).json()
    totals = metric_totals((await soak.target.client.get("/metrics", timeout=PATIENCE * 10)).text)
    return {
        "seconds": round(seconds),
        "processes": len(soak.target.family),
        **found,
        "API server: asyncio tasks": inside["tasks"],
        "requests left": totals.get("vllm:num_requests_running", 0) + totals.get("vllm:num_requests_waiting", 0),
        "sessions left": totals.get("vllm_instant:streaming_sessions", 0),
    }


def slopes(readings: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """The slope of each quantity per hour over the readings after the warm-up, with its 95 % interval and verdict."""
    steady = [one for one in readings if one["seconds"] >= WARM_UP_SECONDS] or list(readings)
    hours = [one["seconds"] / 3600 for one in steady]
    rows = []
    for name in readings[0]:
        if name == "seconds":
            continue
        values = [one.get(name, 0.0) for one in steady]
        limit = MEMORY_LIMIT * statistics.mean(values) if name.endswith("MiB") else COUNT_LIMIT
        row: dict[str, Any] = {"quantity": name, "start": readings[0][name], "after_warm_up": values[0]}
        row |= {"end": values[-1], "highest": max(values), "limit_per_hour": limit}
        if len(values) > 2:
            line = stats.linregress(hours, values)
            # The error of a constant is no number.
            half = float(line.stderr * stats.t.ppf(0.975, len(values) - 2)) if min(values) < max(values) else 0.0
            row |= {"per_hour": float(line.slope), "low": line.slope - half, "high": line.slope + half}
            row["flat"] = bool(row["high"] < limit)
        rows.append(row)
    return rows


def summary(soak: Soak, readings: Sequence[dict[str, float]], cpu_seconds: float) -> dict[str, Any]:
    """The record for the result file."""
    rows = slopes(readings)
    return {
        "minutes": round(readings[-1]["seconds"] / 60, 1),
        "warm_up_minutes": WARM_UP_SECONDS / 60,
        "activities": dict(sorted(soak.done.items())),
        "unacceptable": soak.wrong,
        "engine_alive": bool(soak.target.engine),
        "server_cpu_seconds": round(cpu_seconds, 1),
        "slopes": rows,
        "passed": not soak.wrong and all(row.get("flat", False) for row in rows),
        "readings": list(readings),
    }


def _cpu_seconds(target: Target) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in target.family)


async def run(target: Target, minutes: float, save: Callable[[dict[str, Any]], None]) -> None:
    """Rounds and readings until the time is over; ``save`` gets the record after each reading."""
    soak = Soak(target, random.Random("soak"))
    for prompt in target.prompts:
        soak.expected[prompt] = await soak.complete(prompt)
    await every_shape(soak)
    await every_word(soak)
    readings: list[dict[str, float]] = []
    began, used = time.monotonic(), _cpu_seconds(target)
    while True:
        await weights_loaded_again(soak)
        await asyncio.sleep(REST_SECONDS)
        readings.append(await reading(soak, time.monotonic() - began))
        save(summary(soak, readings, _cpu_seconds(target) - used))
        print(readings[-1], soak.wrong[-3:], flush=True)
        if time.monotonic() - began >= minutes * 60 or not target.engine:
            return
        until = began + READING_SECONDS * len(readings) - REST_SECONDS
        while (now := time.monotonic()) < until:
            await one_round(soak)
            await asyncio.sleep(max(0.0, min(until, now + ROUND_SECONDS) - time.monotonic()))


async def soak(minutes: float, folder: Path, save: Callable[[dict[str, Any]], None]) -> None:
    """One server, whose API server also counts its tasks."""
    prompts = [prompt.text[:300] for prompt in snippets("structured", 0.0, 16, "soak")]
    with server_of(folder, "--middleware", "task_count.TaskCount") as server:
        async with async_client(server.url, headers=HEADERS) as client:
            await run(Target(server.url, client, psutil.Process(server.pid), folder / "state", prompts), minutes, save)
