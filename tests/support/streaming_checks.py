"""Whether prompts that arrive in pieces are answered as whole ones, and whether misbehaving sessions hurt others."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from typing import Any

import httpx
import numpy as np
from streaming_harness import MODEL, drop_at_random, pieces, summary, typed, typing, whole

from vllm_instant.streaming.client import StreamingError, StreamingSession
from vllm_instant.tools.measure.http_client import async_client
from vllm_instant.tools.measure.servers import Server


async def identity_part(url: str, count: int = 50, key: str = "none") -> dict[str, Any]:
    """Typed with edits against whole."""
    request = {"model": MODEL, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    choose = random.Random(5)
    same = 0
    gate = asyncio.Semaphore(4)

    async def one(client: httpx.AsyncClient, number: int, text: str) -> None:
        nonlocal same
        edits = typing(text, random.Random(number))
        async with gate:
            answer = await typed(url, edits, 0.02 * len(edits), choose.choice((0.0, 0.2)), api_key=key, **request)
            # The salt keeps this request from using what the session has read.
            expected = await whole(client, url, text, **request, cache_salt=f"whole {number}")
            same += answer.text == expected.text
            if answer.text != expected.text:
                print(f"differs: {text!r}: {answer.text!r} instead of {expected.text!r}")

    async with async_client(url, headers={"Authorization": f"Bearer {key}"}) as client:
        texts = [pieces(choose.randrange(20, 1500), 1, 1000 + i, odd=True)[0] for i in range(count)]
        await asyncio.gather(*(one(client, number, text) for number, text in enumerate(texts)))
    return {"part": "identity", "prompts": count, "identical": same}


async def abuse_part(server: Server, sessions: int = 200, key: str = "none") -> dict[str, Any]:
    """Sessions that misbehave, while others are served."""
    url = server.url
    request = {"model": MODEL, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    typist = {**request, "api_key": key}
    headers = {"Authorization": f"Bearer {key}"}
    choose = random.Random(9)
    texts = pieces(1500, 40, 77, odd=True)
    errors: list[str] = []
    ttft: dict[str, list[float]] = {"before": [], "during": []}
    moments: dict[str, int] = {}
    phase = "before"
    done = asyncio.Event()

    async def user(client: httpx.AsyncClient, number: int) -> None:
        for turn in itertools.count():
            if done.is_set():
                return
            try:
                answer = await whole(client, url, f"{phase} {number} {turn} " + texts[number][:200], **request)
                ttft[phase].append(answer.after_commit)
                if not answer.text:
                    errors.append("an answer without text")
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")

    async def dropping(gate: asyncio.Semaphore) -> None:
        async with gate:
            moment = await drop_at_random(url, texts, choose, MODEL, headers)
            moments[moment] = moments.get(moment, 0) + 1

    async with async_client(url, max_connections=64, headers=headers) as client:
        await whole(client, url, "warm", **request)
        usage_before = await _settled_usage(client, server)
        users = [asyncio.create_task(user(client, number)) for number in range(2)]
        await asyncio.sleep(4)
        phase = "during"
        idle = [StreamingSession(url, **typist) for _ in range(8)]
        for session in idle:
            await session.__aenter__()
            await session.append(texts[0])
        too_long = await _type_beyond(url, typist)
        gate = asyncio.Semaphore(24)
        await asyncio.gather(*(dropping(gate) for _ in range(sessions)))
        answered = [await _read(session) for session in idle]
        done.set()
        await asyncio.gather(*users)
        for session in idle:
            await session.__aexit__(None, None, None)
        sessions_left, requests_left = await _left(server)
        usage_after = await _settled_usage(client, server)
        alive = (await client.get(f"{url}/health")).status_code == 200
    return {
        "part": "abuse",
        "sessions_dropped": moments,
        "other_requests": {name: len(values) for name, values in ttft.items()},
        "errors_of_other_requests": errors,
        "others_ttft_ms": {name: summary(values) for name, values in ttft.items()},
        "others_ttft_ms_p95": {name: float(np.quantile(values, 0.95)) * 1000 for name, values in ttft.items()},
        "beyond_the_length": too_long,
        "idle_typists_answered": sum(bool(text) for text in answered),
        "kv_cache_usage": {"before": usage_before, "after": usage_after},
        "sessions_left": sessions_left,
        "requests_left": requests_left,
        "alive": alive,
    }


async def _read(session: StreamingSession) -> str:
    return "".join([c["choices"][0]["delta"].get("content") or "" async for c in session.commit() if c["choices"]])


async def _type_beyond(url: str, request: dict[str, Any]) -> str:
    """What a session is told that types more than the model can read; then it makes its text short and is answered."""
    async with StreamingSession(url, **request) as session:
        for _ in range(40):
            await session.append("and the next word is longer than the one before it, " * 5)
            await asyncio.sleep(0.02)
        try:
            await _read(session)
        except StreamingError as error:
            told = str(error)
        else:
            return "answered"
        await session.replace(200, None, "")
        return told if await _read(session) else "never answered again"


async def _left(server: Server) -> tuple[float, float]:
    """Sessions and requests that remain after all clients disconnected; the server has ten seconds to notice."""
    deadline = time.monotonic() + 10
    while True:
        await asyncio.sleep(1.0)
        metrics = server.metrics()
        sessions = metrics["vllm_instant:streaming_sessions"]
        requests = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
        if not sessions + requests or time.monotonic() > deadline:
            return sessions, requests


async def _settled_usage(client: httpx.AsyncClient, server: Server) -> float:
    """Share of the KV cache in use, as the engine reports it at the end of a request that is alone."""
    request = {"model": MODEL, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    await whole(client, server.url, "usage", **request)
    await asyncio.sleep(0.2)
    return server.metrics()["vllm:kv_cache_usage_perc"]
