"""Faults beside eight steady streams: the engine must stay alive, all other answers the same, and nothing be left.

    python benchmarks/chaos.py faults --count 500
    python benchmarks/chaos.py faults --count 100 --layout "two workers"
    python benchmarks/chaos.py kills
    python benchmarks/chaos.py soak --minutes 120

``faults`` injects random faults that must affect no other client (``chaos_faults``) into one server.
``kills`` sends signals to each kind of process, at start and while it serves: all clients must get an answer or a clean
error, nothing may be left after ten seconds, and the next server must answer as before.
``soak`` serves mixed traffic at a low rate (``chaos_soak``): memory, descriptors, threads and tasks must not grow.

Answers are greedy in float32, where they do not depend on what else is in a batch, and are compared with those of the
same server before the first fault.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chaos_soak
import httpx
import psutil
import results
from chaos_faults import FAULTS, PATIENCE, UnacceptableError
from chaos_server import HEADERS, LAYOUTS, Target, server_of

from vllm_instant.tools.measure.http_client import async_client
from vllm_instant.tools.measure.prompts import snippets
from vllm_instant.tools.measure.server_metrics import metric_totals
from vllm_instant.tools.measure.servers import terminable

RESULTS = results.HERE / "results"
STREAMS, TOKENS = 8, 48
KILLS = [
    ("engine core", signal.SIGKILL),
    ("engine core", signal.SIGTERM),
    ("front end", signal.SIGKILL),
    ("front end", signal.SIGTERM),
    ("front end", signal.SIGINT),
    ("front end", signal.SIGHUP),
    ("front end", signal.SIGQUIT),
    ("starting", signal.SIGTERM),
    ("starting", signal.SIGKILL),
]


@dataclass
class Others:
    """What the steady streams saw."""

    equal: int = 0
    changed: int = 0
    failed: int = 0
    messages: list[str] = field(default_factory=list)


async def answer(client: httpx.AsyncClient, prompt: str) -> str:
    """The streamed text of one greedy completion."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json=body, timeout=PATIENCE)
    response.raise_for_status()
    [choice] = response.json()["choices"]
    if choice["finish_reason"] == "abort":
        raise httpx.RemoteProtocolError("the server ends and says that the answer was aborted")
    text: str = choice["text"]
    return text


async def expected_of(client: httpx.AsyncClient, prompts: Sequence[str]) -> dict[str, str]:
    """The answers without faults."""
    places = asyncio.Semaphore(STREAMS)

    async def one(prompt: str) -> str:
        async with places:
            return await answer(client, prompt)

    return dict(zip(prompts, await asyncio.gather(*map(one, prompts)), strict=True))


async def steady(client: httpx.AsyncClient, expected: dict[str, str], seed: int, seen: Others) -> None:
    """One client that asks again and again; only its cancellation ends it."""
    choose = random.Random(seed)
    while True:
        prompt = choose.choice(list(expected))
        try:
            same = await answer(client, prompt) == expected[prompt]
        except httpx.HTTPError as error:
            seen.failed += 1
            seen.messages.append(f"{type(error).__name__}: {error}"[:200])
            await asyncio.sleep(0.2)
        else:
            seen.equal += same
            seen.changed += not same


async def _metrics(client: httpx.AsyncClient) -> dict[str, float]:
    return metric_totals((await client.get("/metrics", timeout=PATIENCE)).text)


def footprint(target: Target) -> dict[str, float]:
    """Processes, file descriptors, threads and resident memory (MiB) of the server."""
    family = target.family
    return {
        "processes": len(family),
        "descriptors": sum(process.num_fds() for process in family),
        "threads": sum(process.num_threads() for process in family),
        "memory_mib": round(sum(process.memory_info().rss for process in family) / 2**20),
    }


LEFTOVERS = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm_instant:streaming_sessions",
    "vllm_instant:streaming_held_sessions",
)


async def inject(target: Target, count: int, seconds: float, choose: random.Random) -> dict[str, Any]:
    """Inject faults until the count or the time is reached."""
    expected = await expected_of(target.client, target.prompts)
    before, seen = footprint(target), Others()
    engines = len(target.engine)
    streams = [asyncio.create_task(steady(target.client, expected, number, seen)) for number in range(STREAMS)]
    done: Counter[str] = Counter()
    wrong: list[str] = []
    memory: list[float] = []
    began = time.monotonic()
    while sum(done.values()) < count and time.monotonic() - began < seconds:
        name = choose.choice(list(FAULTS))
        try:
            await asyncio.wait_for(FAULTS[name](target, choose), 2 * PATIENCE)
        except (UnacceptableError, TimeoutError, OSError, httpx.HTTPError) as error:
            wrong.append(f"{name}: {type(error).__name__} {error}"[:300])
        done[name] += 1
        others = f"{seen.equal} equal, {seen.changed} changed, {seen.failed} failed"
        print(f"{time.monotonic() - began:.0f} s {name}; others {others}", flush=True)
        memory.append(footprint(target)["memory_mib"])
        if len(target.engine) < engines:
            wrong.append(f"the engine died at: {name}")
            break
        await asyncio.sleep(choose.uniform(0, 0.3))
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    await asyncio.sleep(10)
    left = await _metrics(target.client)
    third = max(1, len(memory) // 3)
    return {
        "faults": sum(done.values()),
        "by_kind": dict(sorted(done.items())),
        "seconds": round(time.monotonic() - began),
        "engine_alive": len(target.engine) == engines,
        "unacceptable": wrong,
        "others_equal": seen.equal,
        "others_changed": seen.changed,
        "others_failed": seen.failed,
        "messages": seen.messages[:20],
        "answers_after": await expected_of(target.client, target.prompts) == expected,
        "left_after_10_s": {name: left.get(name, 0.0) for name in LEFTOVERS},
        "footprint": {"before": before, "after": footprint(target)},
        "memory_mib_by_third": [round(statistics.mean(memory[i * third : (i + 1) * third] or [0])) for i in range(3)],
    }


async def faults(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One server and its faults."""
    server = server_of(folder, layout=options.layout)
    prompts = [prompt.text[:400] for prompt in snippets("structured", 0.0, 16, "chaos")]
    with server:
        async with async_client(server.url, headers=HEADERS) as client:
            target = Target(server.url, client, psutil.Process(server.pid), folder / "state", prompts)
            seconds = options.began + options.seconds - time.monotonic()
            return await inject(target, options.count, seconds, random.Random(options.seed))


async def kill(kind: str, number: signal.Signals, folder: Path, expected: dict[str, str] | None) -> dict[str, Any]:
    """One server that gets a signal; returns what its clients saw and what was left."""
    server = server_of(folder)
    prompts = [prompt.text[:400] for prompt in snippets("structured", 0.0, 8, "chaos")]
    try:
        server.launch()
        front, same = psutil.Process(server.pid), None
        async with async_client(server.url, headers=HEADERS) as client:
            seen, streams = Others(), []
            if kind == "starting":
                await asyncio.sleep(8)
            else:
                await asyncio.to_thread(server.wait)
                found = await expected_of(client, prompts)
                same = None if expected is None else found == expected
                streams = [asyncio.create_task(steady(client, found, i, seen)) for i in range(STREAMS)]
                await asyncio.sleep(2)
            family = [front, *front.children(recursive=True)]
            aimed = [p for p in family if "EngineCore" in p.name()] if kind == "engine core" else [front]
            for process in aimed:
                process.send_signal(number)
            await asyncio.sleep(10)
            _, alive = psutil.wait_procs(family, timeout=0)
            hanging = seen.equal + seen.failed
            await asyncio.sleep(1)
            # Streams that still wait for an answer from a server that is gone would report nothing any more.
            hangs = bool(streams) and seen.equal + seen.failed == hanging
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        port_free = False
        with suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))
            port_free = True
        return {
            "killed": kind,
            "signal": number.name,
            "answers_as_before": same,
            "others_changed": seen.changed,
            "clients_hang": hangs,
            "processes_left_after_10_s": [" ".join(p.cmdline())[:120] for p in alive if p.is_running()],
            "port_free": port_free,
            "_expected": None if kind == "starting" else found,
        }
    finally:
        server.stop()


async def kills(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All kinds of kills, one server after the other on one folder of learned state."""
    expected: dict[str, str] | None = None
    rows = []
    for kind, number in KILLS:
        row = await kill(kind, number, folder, expected)
        expected = row.pop("_expected") or expected
        print(row, flush=True)
        rows.append(row)
    return {"kills": rows}


async def soak(options: argparse.Namespace, folder: Path) -> None:
    """Write the result file after each reading."""

    def save(record: dict[str, Any]) -> None:
        results.write(options.output or RESULTS / "soak.json", [{"part": "soak", **record}])

    await chaos_soak.soak(options.minutes, folder, save)


def main() -> None:
    """Run one part, print it and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["faults", "kills", "soak"])
    parser.add_argument("--count", type=int, default=500, help="number of faults")
    parser.add_argument("--seconds", type=float, default=3600.0, help="limit for the last fault, the start included")
    parser.add_argument("--minutes", type=float, default=120.0, help="length of the soak")
    parser.add_argument("--seed", default="1", help="of the faults; runs with other seeds stay in the result file")
    parser.add_argument("--layout", choices=LAYOUTS, default="one engine", help="of the server that gets the faults")
    parser.add_argument("--output", type=Path, help="by default chaos.json or soak.json in benchmarks/results")
    options = parser.parse_args()
    options.began = time.monotonic()
    for number in (signal.SIGHUP, signal.SIGQUIT):
        # A background job or nohup ignores them, and its servers would as well.
        signal.signal(number, signal.SIG_DFL)
    with terminable(), tempfile.TemporaryDirectory() as folder:
        if options.part == "soak":
            asyncio.run(soak(options, Path(folder)))
            return
        found = asyncio.run((faults if options.part == "faults" else kills)(options, Path(folder)))
    if options.part == "faults":
        print(found)
    name = options.part
    if options.part == "faults":
        name = f"faults, seed {options.seed}" + f", {options.layout}" * (options.layout != "one engine")
    results.write(options.output or RESULTS / "chaos.json", [found], name=name)


if __name__ == "__main__":
    main()
