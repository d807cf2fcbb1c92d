"""How many streams one load generator on one core can follow, and how truly it measures them.

.venv/bin/python benchmarks/loadtest_capacity.py

The mock server streams tokens at a set pace on one core and writes down when it sent what; the load generator is pinned
to the other core. Compared are the arrivals that it recorded with what the mock wrote down, event by event, for each
number of streams; and the share of its core with that of Locust's own FastHttpUser reading the same streams.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from results import write

from vllm_instant_loadtests.run_recorder import RecordedRun

HERE = Path(__file__).resolve().parent
LOCUSTFILE = HERE.parent / "loadtests/locustfile.py"
SCENARIO = """
title = "Capacity"
seconds = {seconds}

[[traffic]]
kind = "stream"
prompts = "code"
arrivals = "even"
rate = [[0, {rate}], [{ramp}, {rate}], [{ramp}, 0]]
max_tokens = {tokens}
"""
RAMP = 5.0


@contextmanager
def mock(core: int, step_ms: float, truth: Path) -> Iterator[str]:
    """The mock's address while it serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--port", str(port), "--step-ms", str(step_ms), "--truth", str(truth)]
    process = pinned([sys.executable, "-m", "vllm_instant_loadtests.mock", *words], core)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                httpx.get(f"{url}/health", timeout=1)
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def pinned(command: Sequence[str], core: int, **more: Any) -> subprocess.Popen[str]:
    """A process on one core."""
    return subprocess.Popen(command, text=True, preexec_fn=lambda: os.sched_setaffinity(0, {core}), **more)


def one_load(streams: int, step_ms: float, seconds: float, folder: Path) -> dict[str, Any]:
    """Follow so many streams at the same time for so long."""
    scenario = folder / f"streams-{streams}.toml"
    tokens = int((seconds + RAMP) * 1e3 / step_ms)
    scenario.write_text(SCENARIO.format(seconds=RAMP + 1, rate=(streams + 0.5) / RAMP, ramp=RAMP, tokens=tokens))
    truth, output = folder / f"truth-{streams}.jsonl", folder / f"run-{streams}"
    words = ["--headless", "--scenario", str(scenario), "--output", str(output), "--only-summary"]
    with mock(1, step_ms, truth) as url:
        client = pinned([sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, *words], 0)
        if client.wait() != 0:
            raise SystemExit("the load generator failed")
    sent = {line["id"]: line["sent"] for line in map(json.loads, truth.read_text().splitlines())}
    return compared(RecordedRun.read(output), sent, streams, step_ms)


def compared(run: RecordedRun, sent: dict[str, list[list[float]]], streams: int, step_ms: float) -> dict[str, Any]:
    """What was recorded beside what the mock sent."""
    clock = run.about["clock"]
    late, ttft_error, ours, theirs = [], [], [], []
    ours_ttft, theirs_ttft = [], []
    failed = [request.error for request in run.requests if request.error]
    for request in run.requests:
        truth = {tokens: when - clock for when, tokens in sent[request.id]}
        late += [when - truth[tokens] for when, tokens in request.arrivals]
        ours += list(itl(request.arrivals))
        theirs += list(itl(sorted((when, tokens) for tokens, when in truth.items())))
        ours_ttft.append(request.ttft)
        theirs_ttft.append(truth[1] - request.due)
        ttft_error.append(ours_ttft[-1] - theirs_ttft[-1])
    all_begun = max(request.arrivals[0][0] for request in run.requests)
    first_end = min(request.ended for request in run.requests)
    during = [reading for reading in run.client if all_begun < reading.at - 0.5 and reading.at < first_end]
    return {
        "streams": streams,
        "events_a_second": round(streams * 1e3 / step_ms),
        "seconds_with_all_streams": round(first_end - all_begun, 1),
        "failed": len(failed),
        "core_share": spread([reading.cpu for reading in during]),
        "timer_late_ms": spread([reading.late * 1e3 for reading in during]),
        "read_after_sent_ms": spread(np.array(late) * 1e3),
        "itl_ms": {"sent": spread(np.array(theirs) * 1e3), "recorded": spread(np.array(ours) * 1e3)},
        "ttft_ms": {"sent": spread(np.array(theirs_ttft) * 1e3), "recorded": spread(np.array(ours_ttft) * 1e3)},
        "ttft_error_ms": spread(np.array(ttft_error) * 1e3),
    }


def itl(arrivals: Sequence[Any]) -> np.ndarray:
    """Seconds between tokens, one entry a token after the first arrival."""
    times, totals = np.array(arrivals).T
    tokens = np.diff(totals)
    return np.repeat(np.diff(times) / tokens, tokens.astype(int))


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, 95th and 99th percentile, and the largest."""
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {"p50": round(p50, 3), "p95": round(p95, 3), "p99": round(p99, 3), "max": round(float(np.max(values)), 3)}


def fast_http(streams: int, step_ms: float, seconds: float, folder: Path) -> dict[str, Any]:
    """The same number of streams under FastHttpUser, one event read at a time."""
    with mock(1, step_ms, folder / "truth-fast.jsonl") as url:
        words = ["--headless", "-u", str(streams), "-r", "95", "-t", str(int(RAMP + 2 + seconds)), "--only-summary"]
        command = [sys.executable, "-m", "locust", "-f", str(HERE / "loadtest_fasthttp.py"), "--host", url, *words]
        output = pinned(command, 0, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).communicate()[0]
    readings = [json.loads(line) for line in re.findall(r"^\{.*\}$", output, re.MULTILINE)]
    steady = readings[-int(seconds / 0.5) + 2 : -2]
    return {
        "streams": streams,
        "core_share": spread([reading["cpu"] for reading in steady]),
        "timer_late_ms": spread([reading["late"] * 1e3 for reading in steady]),
    }


def main() -> None:
    """Measure, print and write ``benchmarks/results/loadtest_capacity.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="100,500,1000")
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--output", type=Path, default=HERE / "results/loadtest_capacity.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loadtest-capacity-") as name:
        loads = [
            one_load(int(streams), options.step_ms, options.seconds, Path(name))
            for streams in options.streams.split(",")
        ]
        other = fast_http(500, options.step_ms, options.seconds, Path(name))
    for load in loads:
        print(json.dumps(load))
    print(json.dumps(other))
    write(options.output, {"loads": loads, "fast_http_user": other})


if __name__ == "__main__":
    main()
