"""Reads the servers' metrics and decision traces while a load test runs, in a process of its own.

Reading and parsing take milliseconds, which would delay every stream of the load generator.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from vllm_instant.tools.measure.http_client import async_client
from vllm_instant.tools.measure.server_info import authorization
from vllm_instant.tools.measure.server_metrics import GENERATED, metric_totals
from vllm_instant_loadtests.host_evidence import HostReader, host_reader
from vllm_instant_loadtests.run_recorder import DecisionSample, MetricsSample, RunRecorder

SECONDS = 0.5
"""Time between two readings of a server."""
DECISIONS = 200
"""Decisions per reading; more steps than this per ``DECISION_SECONDS`` leave gaps."""
DECISION_SECONDS = 1.0
PREFIXES = ("vllm:", "vllm_instant:", "process_")
"""Of the metrics that are recorded."""


class DecisionPlacement:
    """Places the decisions of one server on the run's clock.

    A decision has the duration of its step, but no time. The newest one of a reading is placed at the reading, each
    earlier one ends where the next begins, and none lies before the previous reading: the error is at most the time
    between two readings.
    """

    def __init__(self) -> None:
        self._newest: dict[int, int] = {}
        self._read_at = 0.0

    def place(self, answer: Mapping[str, Any], at: float) -> list[tuple[float, dict[str, Any]]]:
        """The new decisions in an answer of ``/v1/instant/decisions`` at time ``at``, the oldest first."""
        placed: list[tuple[float, dict[str, Any]]] = []
        for engine in answer["engines"]:
            number, found = int(engine["engine"]), engine["decisions"]
            known = self._newest.get(number, -1)
            if found and int(found[-1]["step"]) < known:
                known = -1  # the engine was restarted
            new = [decision for decision in found if decision.get("outcome") and int(decision["step"]) > known]
            end, backwards = at, []
            for decision in reversed(new):
                backwards.append((max(end, self._read_at), decision))
                end -= decision["outcome"]["milliseconds"] / 1e3
            placed += backwards[::-1]
            if new:
                self._newest[number] = int(new[-1]["step"])
        self._read_at = at
        return placed


async def poll(recorder: RunRecorder, servers: Mapping[str, str], clock: float, every: float) -> None:
    """Read all servers until cancelled.

    Args:
        recorder: is filled.
        servers: addresses by name.
        clock: ``time.perf_counter`` at second 0 of the run.
        every: seconds between two readings of a server.

    """
    await asyncio.gather(*(_poll(recorder, name, url, clock, every) for name, url in servers.items()))


async def _poll(recorder: RunRecorder, name: str, url: str, clock: float, every: float) -> None:
    host = host_reader(url, os.getppid())
    async with async_client(url, headers=authorization(None), timeout=30) as client:
        await _poll_with(client, recorder, name, clock, every, host)


async def _poll_with(
    client: httpx.AsyncClient,
    recorder: RunRecorder,
    name: str,
    clock: float,
    every: float,
    host: HostReader | None = None,
) -> None:
    placing, explains, asked = DecisionPlacement(), True, 0.0
    tokens, busy = -1.0, False
    while True:
        began = time.perf_counter()
        try:
            answer = await client.get("/metrics")
            now = time.perf_counter()
            if answer.status_code == 200:
                found = metric_totals(answer.text, PREFIXES)
                evidence = host.reading() if host is not None else {}
                recorder.add(MetricsSample(name, round(now - clock, 4), round(now - began, 5), found | evidence))
                busy = busy or found.get(GENERATED) != tokens
                tokens = found.get(GENERATED, -1.0)
            # An idle engine is not asked: answering would wake it.
            if explains and busy and now - asked >= DECISION_SECONDS:
                asked, busy = now, False
                trace = await client.get("/v1/instant/decisions", params={"last": DECISIONS})
                explains = trace.status_code == 200
                if explains:
                    for at, decision in placing.place(trace.json(), time.perf_counter() - clock):
                        recorder.add(DecisionSample(name, round(at, 4), decision))
        except httpx.HTTPError:
            pass  # a server that does not answer leaves a gap
        await asyncio.sleep(max(0.05, began + every - time.perf_counter()))


def main() -> None:
    """``FOLDER --clock SECONDS NAME=URL …``; ends when it is terminated, or when its parent has ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--clock", type=float, required=True)
    parser.add_argument("--every", type=float, default=SECONDS)
    options = parser.parse_args()
    servers = dict(server.split("=", 1) for server in options.servers)
    recorder = RunRecorder(options.folder, None)
    try:
        asyncio.run(_until_terminated(recorder, servers, options.clock, options.every))
    finally:
        recorder.close()


async def _until_terminated(recorder: RunRecorder, servers: Mapping[str, str], clock: float, every: float) -> None:
    stopped, parent = asyncio.Event(), os.getppid()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    polling = asyncio.create_task(poll(recorder, servers, clock, every))
    while not stopped.is_set() and not polling.done() and os.getppid() == parent:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await stopped.wait()
    polling.cancel()


if __name__ == "__main__":
    main()
