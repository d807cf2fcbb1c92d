"""Reads the servers' metrics and decision traces while a load test runs; a process of its own.

Reading and parsing take milliseconds, which would delay every stream of a load generator that did it itself.
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

from vllm_instant.tools.measure.server_info import authorization
from vllm_instant.tools.measure.server_metrics import GENERATED, metric_totals
from vllm_instant_loadtests.run_recorder import DecisionSample, MetricsSample, RunRecorder

SECONDS = 0.5
"""Between two readings of a server."""
DECISIONS = 200
"""Read at a time; more steps than this in a second leave gaps."""
DECISION_SECONDS = 1.0
PREFIXES = ("vllm:", "vllm_instant:", "process_")
"""Of the metrics that are recorded."""


class DecisionPlacement:
    """Places the decisions of one server on the run's clock.

    A decision says how long its step took, not when it was. The newest one of a reading is put at the reading, those
    before it end where the next begins, and none before the reading before: right within that reading's interval.
    """

    def __init__(self) -> None:
        self._newest: dict[int, int] = {}
        self._read_at = 0.0

    def place(self, answer: Mapping[str, Any], at: float) -> list[tuple[float, dict[str, Any]]]:
        """What is new in an answer of ``/v1/instant/decisions`` that came at ``at``, the oldest first."""
        placed: list[tuple[float, dict[str, Any]]] = []
        for engine in answer["engines"]:
            number, found = int(engine["engine"]), engine["decisions"]
            known = self._newest.get(number, -1)
            if found and int(found[-1]["step"]) < known:
                known = -1  # the engine was started again
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


async def watch(recorder: RunRecorder, servers: Mapping[str, str], clock: float, every: float) -> None:
    """Read until cancelled.

    Args:
        recorder: is filled.
        servers: addresses by name.
        clock: ``time.perf_counter`` at second 0 of the run.
        every: seconds between two readings of a server.

    """
    async with httpx.AsyncClient(headers=authorization(None), timeout=30) as client:
        await asyncio.gather(*(_watch(client, recorder, name, url, clock, every) for name, url in servers.items()))


async def _watch(
    client: httpx.AsyncClient, recorder: RunRecorder, name: str, url: str, clock: float, every: float
) -> None:
    placing, explains, asked = DecisionPlacement(), True, 0.0
    tokens, busy = -1.0, False
    while True:
        began = time.perf_counter()
        try:
            answer = await client.get(f"{url}/metrics")
            now = time.perf_counter()
            if answer.status_code == 200:
                found = metric_totals(answer.text, PREFIXES)
                recorder.add(MetricsSample(name, round(now - clock, 4), round(now - began, 5), found))
                busy = busy or found.get(GENERATED) != tokens
                tokens = found.get(GENERATED, -1.0)
            # An idle engine is left alone: a question would wake it.
            if explains and busy and now - asked >= DECISION_SECONDS:
                asked, busy = now, False
                trace = await client.get(f"{url}/v1/instant/decisions", params={"last": DECISIONS})
                explains = trace.status_code == 200
                if explains:
                    for at, decision in placing.place(trace.json(), time.perf_counter() - clock):
                        recorder.add(DecisionSample(name, round(at, 4), decision))
        except httpx.HTTPError:
            pass  # a server that does not answer shows as a gap
        await asyncio.sleep(max(0.05, began + every - time.perf_counter()))


def main() -> None:
    """``FOLDER --clock SECONDS NAME=URL …``; ends when it is terminated, or left alone."""
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
    watching = asyncio.create_task(watch(recorder, servers, clock, every))
    while not stopped.is_set() and not watching.done() and os.getppid() == parent:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await stopped.wait()
    watching.cancel()


if __name__ == "__main__":
    main()
