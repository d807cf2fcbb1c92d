"""Clients that type a prompt, and their answers; shared by the streaming benchmark and the engine tests."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import websockets

from vllm_instant.streaming.client import StreamingError, StreamingSession
from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.measure.statistics import median_interval

MODEL = "demo"
ODD = (
    "🙂",
    "👩‍👩‍👧",
    "🇩🇪",
    "é",
    "ẹ́",
    "नमस्ते",
    "שלום עולם",
    "مرحبا بالعالم",
    "日本語の文",
    "\u202babc\u202c",
    "ﬁn",
    "각",
)
"""Emoji, flags, joined emoji, combining characters, scripts from right to left, ligatures, syllables in parts."""

Edit = tuple[int, int, str]
"""``start, end, text``: what ``StreamingSession.replace`` takes."""


@dataclass
class Answer:
    """An answer; times in seconds."""

    text: str = ""
    after_last_key: float = float("nan")
    """From the last change of the text to the first token, as the client sees it."""
    after_commit: float = float("nan")
    in_server: float = float("nan")
    """From commit to first token, as the server says; NaN for requests without a session."""
    steps: list[float] = field(default_factory=list)
    """Between later chunks."""


def pieces(characters: int, count: int, seed: int, odd: bool = False) -> list[str]:
    """Text that the demo models were not trained on, no two pieces with the same beginning."""
    choose = random.Random(seed)
    texts = [text for text in _held_out() if len(text) > 2 * characters]
    found = []
    for _ in range(count):
        text = choose.choice(texts)
        start = choose.randrange(len(text) - characters)
        piece = f"{choose.randrange(10**6)} {text[start : start + characters]}"
        for _ in range(choose.randrange(2, 9) if odd else 0):
            at = choose.randrange(len(piece))
            piece = piece[:at] + choose.choice(ODD) + piece[at:]
        found.append(piece)
    return found


@functools.cache
def _held_out() -> list[str]:
    return [document.text for document in documents() if document.held_out]


def typing(text: str, choose: random.Random) -> list[Edit]:
    """Edits that end in ``text``: pieces of random length, mistakes mended at once or later, a new beginning."""
    edits: list[Edit] = []
    now = ""

    def put(start: int, end: int, new: str) -> None:
        nonlocal now
        edits.append((start, end, new))
        now = now[:start] + new + now[end:]

    done = 0
    while done < len(text):
        length = min(choose.choice((1, 2, 5, 17, 60, 150)), len(text) - done)
        put(len(now), len(now), text[done : done + length])
        done += length
        if choose.random() < 0.15:  # a slip of the finger, taken back
            put(len(now), len(now), choose.choice(("x", "  ", *ODD)))
            put(done, len(now), "")
        if choose.random() < 0.1:  # something earlier is written again
            start = choose.randrange(done)
            end = min(done, start + choose.randrange(1, 30))
            put(start, end, choose.choice(("", "?", "oops ", *ODD)))
            put(start, len(now), text[start:done])
    if choose.random() < 0.3:
        put(0, 0, "No: ")
        put(0, 4, "")
    return edits


async def typed(
    url: str,
    edits: Sequence[Edit],
    seconds: float,
    pause: float = 0.0,
    **request: Any,
) -> Answer:
    """A session whose text is changed over ``seconds`` and committed ``pause`` seconds after the last change."""
    answer = Answer()
    async with StreamingSession(url, **request) as session:
        began = time.perf_counter()
        for number, (start, end, text) in enumerate(edits):
            await asyncio.sleep(began + seconds * number / len(edits) - time.perf_counter())
            await session.replace(start, end, text)
        last = time.perf_counter()
        await asyncio.sleep(pause)
        await _follow(session.commit(), answer, last)
        answer.in_server = session.first_token_seconds or float("nan")
    return answer


async def whole(client: httpx.AsyncClient, url: str, text: str, **request: Any) -> Answer:
    """The same prompt, sent to ``/v1/chat/completions`` when it is complete."""
    body = {"messages": [{"role": "user", "content": text}], "stream": True, **request}
    answer = Answer()
    sent = time.perf_counter()

    async def chunks() -> Any:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
            if response.status_code != 200:
                raise StreamingError((await response.aread()).decode()[:300], str(response.status_code))
            async for line in response.aiter_lines():
                if line.startswith("data:") and "[DONE]" not in line:
                    yield json.loads(line.removeprefix("data:"))

    await _follow(chunks(), answer, sent)
    return answer


async def _follow(chunks: Any, answer: Answer, last: float) -> None:
    asked = before = time.perf_counter()
    async for chunk in chunks:
        now = time.perf_counter()
        text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        if not text:
            continue
        if answer.text:
            answer.steps.append(now - before)
        else:
            answer.after_last_key, answer.after_commit = now - last, now - asked
        answer.text += text
        before = now


def keystrokes(text: str, characters: int = 5) -> list[Edit]:
    """Plain typing, a few characters at a time."""
    return [(at, at, text[at : at + characters]) for at in range(0, len(text), characters)]


async def drop_at_random(
    url: str, texts: Sequence[str], choose: random.Random, model: str, headers: Mapping[str, str]
) -> str:
    """Open a session and go away at a random moment, without a word; returns when it was."""
    address = "ws" + url.removeprefix("http") + "/v1/instant/session"
    moment = choose.choice(("opened", "configured", "typing", "typing", "answering", "nonsense"))
    connection = await websockets.connect(address, additional_headers=headers)
    try:
        if moment != "opened":
            session = {"model": model, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
            await connection.send(json.dumps({"type": "session.update", "session": session}))
        if moment in ("typing", "answering", "nonsense"):
            for start, end, text in typing(choose.choice(texts), choose)[:30]:
                event = {"type": "input_text.replace", "start": start, "end": end, "text": text}
                await connection.send(json.dumps(event) if moment != "nonsense" else json.dumps(event)[:-3])
                await asyncio.sleep(choose.random() * 0.02)
        if moment == "answering":
            await connection.send(json.dumps({"type": "input_text.commit"}))
            with suppress(TimeoutError):
                async with asyncio.timeout(choose.random() * 0.5):
                    while True:
                        await connection.recv()
    finally:
        connection.transport.abort()
    return moment


def summary(values: list[float]) -> dict[str, float]:
    """Median and interval, in milliseconds."""
    return {name: value * 1000 for name, value in vars(median_interval(values)).items()}
