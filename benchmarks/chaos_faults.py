"""Faults for a running server that must affect no client but the one that causes them.

Each is a coroutine that gets the target and a random generator, and raises ``UnacceptableError`` where the server's
own reaction is wrong: a 5xx answer, another client's data, or no answer at all.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import websockets
from chaos_server import HEADERS, KEY, Target

SESSIONS = "/v1/instant/sessions"
PATIENCE = 60.0
"""Seconds after which a request that has no answer counts as lost."""


class UnacceptableError(Exception):
    """The server reacted to a fault in a way that harms its users."""


Fault = Callable[[Target, random.Random], Awaitable[None]]


def _acceptable(response: httpx.Response, what: str) -> None:
    if response.status_code >= 500:
        raise UnacceptableError(f"{what}: HTTP {response.status_code} {response.text[:200]}")


async def _post(target: Target, path: str, body: Any, what: str) -> httpx.Response:
    response = await target.client.post(path, json=body, timeout=PATIENCE)
    _acceptable(response, what)
    return response


# ------------------------------------------------------------------------------------------------ connections


async def _raw(target: Target, text: bytes, seconds: float, reset: bool) -> None:
    """Send bytes, read nothing, and leave after some seconds, with RST instead of FIN if wished."""
    _, writer = await asyncio.open_connection(*target.address)
    writer.write(text)
    await writer.drain()
    await asyncio.sleep(seconds)
    if reset:
        found: socket.socket = writer.get_extra_info("socket")
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


def _http(path: str, body: Any, length: int | None = None) -> bytes:
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length or len(text)}\r\n\r\n".encode() + text


async def client_leaves(target: Target, choose: random.Random) -> None:
    """A streaming client disappears before, at, or after its first token; by FIN or RST."""
    body = target.body(choose, stream=True, max_tokens=96)
    await _raw(target, _http("/v1/completions", body), choose.choice([0.0, 0.03, 0.3, 1.0]), choose.random() < 0.5)


async def slow_reader(target: Target, choose: random.Random) -> None:
    """A streaming client with a small receive buffer reads nothing for two seconds."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    made.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(made, target.address)
        body = target.body(choose, stream=True, max_tokens=200, logprobs=5)
        await loop.sock_sendall(made, _http("/v1/completions", body))
        await asyncio.sleep(2.0)
    finally:
        made.close()


async def slow_writer(target: Target, choose: random.Random) -> None:
    """A body that is announced and never completed."""
    path = choose.choice(["/v1/completions", SESSIONS, "/v1/instant/tokens"])
    await _raw(target, _http(path, {"model": "demo"}, length=10_000), 1.0, choose.random() < 0.5)


async def not_http(target: Target, choose: random.Random) -> None:
    """Bytes that are no request."""
    await _raw(target, choose.choice([b"\0" * 4096, b"GET /v1 \r\n\r\n", choose.randbytes(2000)]), 0.1, True)


# ------------------------------------------------------------------------------------------------ sessions


def _socket(target: Target) -> Any:
    url = target.url.replace("http", "ws", 1) + "/v1/instant/session"
    return websockets.connect(url, additional_headers=HEADERS, max_size=None, open_timeout=PATIENCE)


async def session_flood(target: Target, choose: random.Random) -> None:
    """Thousands of tiny edits, or one large one, and the connection is dropped without a close frame."""
    async with _socket(target) as connection:
        await connection.send(json.dumps({"type": "session.update", "session": {"model": "demo"}}))
        if choose.random() < 0.5:
            for _ in range(1000):
                await connection.send('{"type": "input_text.append", "text": "x "}')
        else:
            await connection.send(json.dumps({"type": "input_text.append", "text": "word " * 20_000}))
        await asyncio.sleep(choose.choice([0.0, 0.2]))
        connection.transport.abort()


async def session_dropped(target: Target, choose: random.Random) -> None:
    """A session is dropped before its commit, right after it, or within its answer."""
    async with _socket(target) as connection:
        update = {"model": "demo", "max_tokens": 64}
        await connection.send(json.dumps({"type": "session.update", "session": update}))
        await connection.send(json.dumps({"type": "input_text.append", "text": choose.choice(target.prompts)[:300]}))
        stage = choose.randrange(3)
        if stage:
            await connection.send('{"type": "input_text.commit"}')
        await asyncio.sleep(0.5 if stage == 2 else 0.0)
        connection.transport.abort()


async def session_events(target: Target, choose: random.Random) -> None:
    """Lists of many events, deep and odd JSON, over plain HTTP."""
    opened = await target.client.post(SESSIONS, json={"model": "demo"}, timeout=PATIENCE)
    _acceptable(opened, "opening a session")
    if opened.status_code != 201:
        return
    path = f"{SESSIONS}/{opened.json()['id']}"
    edits: list[Any] = [{"type": "input_text.append", "text": "a "}] * 500
    deep = "[" * 20_000 + "]" * 20_000
    odd = choose.choice([edits, [], None, 7, {"type": None}, {"type": "input_text.replace", "start": -1, "end": 1e99}])
    try:
        content = deep if choose.random() < 0.3 else json.dumps(odd)
        answer = await target.client.post(path, content=content, timeout=PATIENCE)
        _acceptable(answer, f"session events {content[:60]}")
    finally:
        await target.client.delete(path, timeout=PATIENCE)


async def too_many_sessions(target: Target, choose: random.Random) -> None:
    """More sessions than a client may have, and the ids of others."""
    opened = []
    for _ in range(40):
        answer = await _post(target, SESSIONS, {"model": "demo"}, "opening a session")
        if answer.status_code == 201:
            opened.append(answer.json()["id"])
    guess = f"{SESSIONS}/{choose.randbytes(8).hex()}"
    for method in ("POST", "DELETE"):
        answer = await target.client.request(method, guess, json={}, timeout=PATIENCE)
        if answer.status_code != 404:
            raise UnacceptableError(f"{method} of an unknown session: HTTP {answer.status_code}")
    for identity in opened:
        await target.client.delete(f"{SESSIONS}/{identity}", timeout=PATIENCE)


# ------------------------------------------------------------------------------------------------ requests

ODD_VALUES: list[Any] = [0, 1, -1, 1e308, 2**63, "", "off", "8", None, [], {}, True, "NaN", "\0", "x" * 5000]
XARGS = ["instant_speculation", "instant_output_tokens", "instant_experts", "instant_hold", "instant_unknown"]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 2.0, "top_p": 0.01},
    {"temperature": 1.0, "top_k": 1, "seed": 1},
    {"temperature": 0.5, "min_p": 0.9},
    {"n": 3, "temperature": 1.0},
    {"logprobs": 5, "prompt_logprobs": 2},
    {"echo": True, "max_tokens": 1},
    {"stop": ["\n", " "], "include_stop_str_in_output": True},
    {"presence_penalty": 2.0, "frequency_penalty": -2.0, "repetition_penalty": 1.9},
    {"logit_bias": {"5": 100, "17": -100}},
    {"bad_words": ["def", "return"]},
    {"min_tokens": 20},
    {"temperature": -1},
    {"top_p": 7},
    {"max_tokens": 10**9},
    {"max_tokens": -1},
    {"structured_outputs": {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}}},
    {"structured_outputs": {"regex": "(a|b)*c"}},
    {"structured_outputs": {"json": {"type": "nonsense"}}},
    {"prompt": ""},
    {"prompt": [1]},
    {"prompt": [-1, 10**9]},
    {"prompt": "word " * 5000},
    {"truncate_prompt_tokens": 1},
]


async def odd_arguments(target: Target, choose: random.Random) -> None:
    """``vllm_xargs`` of any name and value."""
    given = {choose.choice(XARGS): choose.choice(ODD_VALUES) for _ in range(choose.randint(1, 3))}
    await _post(target, "/v1/completions", target.body(choose, vllm_xargs=given), f"vllm_xargs {given!s:.80}")


async def odd_sampling(target: Target, choose: random.Random) -> None:
    """Sampling options of all kinds, two sets at once, beside pinned drafts."""
    given = choose.choice(SAMPLING) | choose.choice(SAMPLING)
    body = target.body(choose, **({"vllm_xargs": {"instant_speculation": choose.choice([0, 4])}} | given))
    await _post(target, "/v1/completions", body, f"sampling {given!s:.80}")


async def diagnostics(target: Target, choose: random.Random) -> None:
    """Every diagnostic route at once, with odd queries."""
    paths = ["/v1/instant/decisions", "/v1/instant/queue", "/v1/instant/deployment", "/v1/instant/experts", "/metrics"]
    query = choose.choice(["", "?limit=-1", "?limit=1e9", "?limit=x", "?engine=99", "?request=" + "y" * 3000])
    answers = await asyncio.gather(*(target.client.get(path + query, timeout=PATIENCE) for path in paths * 3))
    for answer in answers:
        _acceptable(answer, f"{answer.url}")


# ------------------------------------------------------------------------------------------------ processes and disk


async def paused(target: Target, choose: random.Random) -> None:
    """Some or all processes are stopped for up to 1.5 seconds, as by a debugger, a snapshot or a full host."""
    family = choose.choice([target.engine, [target.front], target.family])
    try:
        for process in family:
            os.kill(process.pid, signal.SIGSTOP)
        await asyncio.sleep(choose.uniform(0.1, 1.5))
    finally:
        for process in family:
            os.kill(process.pid, signal.SIGCONT)


async def state_spoiled(target: Target, choose: random.Random) -> None:
    """Files of learned state are replaced: garbage, a folder, deep JSON, nothing."""
    target.state.mkdir(parents=True, exist_ok=True)
    for path in target.state.glob("*.json"):
        if path.is_dir():
            path.rmdir()
        elif choose.random() < 0.5:
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(choose.choice([b"", b"NaN", b"[" * 10**5, choose.randbytes(5000)]))


async def prefix_cache_reset(target: Target, choose: random.Random) -> None:
    """The prefix cache is reset under running requests."""
    await _post(target, "/reset_prefix_cache", None, "resetting the prefix cache")


FAULTS: dict[str, Fault] = {
    "client leaves": client_leaves,
    "slow reader": slow_reader,
    "slow writer": slow_writer,
    "no HTTP": not_http,
    "flood of edits": session_flood,
    "session dropped": session_dropped,
    "odd session events": session_events,
    "too many sessions": too_many_sessions,
    "odd vllm_xargs": odd_arguments,
    "odd sampling": odd_sampling,
    "diagnostics": diagnostics,
    "processes paused": paused,
    "state spoiled": state_spoiled,
    "prefix cache reset": prefix_cache_reset,
}
