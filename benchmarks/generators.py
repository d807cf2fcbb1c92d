"""Load generators side by side: timing error and CPU time per stream, against a mock server that records what it sent.

    .venv/bin/python benchmarks/generators.py own|guidellm|aiperf [--streams 500] [--path FOLDER]

The mock server advances all streams in steps, as a batch does, and records when it sent what (``--truth``). Every
generator keeps a fixed number of streams open for the same time, with as many events per second in all whatever their
number; it runs on one core, the mock on the other one. Reported are the CPU time of the generator's processes, and the
percentiles of what it recorded next to those of what was sent: the time to the first token (which the mock sends 50 ms
after a request has arrived) and the mean time between the tokens of a request, which all generators report.

guidellm and AIPerf are no dependencies: ``--path`` is a folder into which they were installed (`pip install --target`).
They need a tokenizer; the demo's public chat model has one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from results import HERE, write

from vllm_instant.tools.demo import real_model
from vllm_instant_loadtests.request_tables import mean_itl
from vllm_instant_loadtests.run_recorder import RecordedRun

RESULT = HERE / "results/generators.json"
PORT = 8907
FIRST_MS = 50.0
WARM_UP = 5
"""Seconds at the beginning whose requests do not count."""


def own(streams: int, tokens: int, seconds: int, folder: Path) -> list[str]:
    """Our Locust users, one request after the other."""
    scenario = folder / "s.toml"
    scenario.write_text(
        f'title = "streams"\nseconds = 600\n[[traffic]]\nkind = "a"\nprompts = "creative"\nrate = 20\n'
        f"max_tokens = {tokens}\n"
    )
    words = ["--closed-loop", "--scenario", str(scenario), "--output", str(folder / "run")]
    users = ["--users", str(streams), "--spawn-rate", str(streams), "--duration", str(seconds)]
    locustfile = HERE.parent / "loadtests/locustfile.py"
    return [
        *(sys.executable, "-m", "locust", "-f", str(locustfile), "--headless", "--only-summary"),
        *("--host", f"http://127.0.0.1:{PORT}", *words, *users),
    ]


def guidellm(streams: int, tokens: int, seconds: int, folder: Path) -> list[str]:
    """The profile ``concurrent``."""
    model = real_model.prepare()
    return [
        *(sys.executable, "-m", "guidellm", "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target=http://127.0.0.1:{PORT},model=mock"),
        *("--profile", f"kind=concurrent,streams={streams}", "--constraint", f"kind=max_duration,seconds={seconds}"),
        *("--tokenizer", f"kind=hf_auto,model={model}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=16,output_tokens={tokens}"),
        *("--output", f"kind=json,path={folder / 'guidellm.json'}"),
    ]


def aiperf(streams: int, tokens: int, seconds: int, folder: Path) -> list[str]:
    """``profile`` with a fixed concurrency. It finds tokenizers in a cache of Hugging Face's layout only."""
    repository = folder / "hf/hub/models--demo--chat"
    for name in ("refs", "snapshots"):
        (repository / name).mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).symlink_to(real_model.prepare())
    return [
        *(sys.executable, "-m", "aiperf", "profile", "--model", "mock", "--url", f"http://127.0.0.1:{PORT}"),
        *("--endpoint-type", "chat", "--streaming", "--concurrency", str(streams)),
        *("--benchmark-duration", str(seconds), "--tokenizer", "demo/chat"),
        *("--synthetic-input-tokens-mean", "16", "--output-tokens-mean", str(tokens), "--ui", "none"),
        *("--output-artifact-dir", str(folder / "aiperf")),
    ]


GENERATORS = {"own": own, "guidellm": guidellm, "aiperf": aiperf}


def recorded(generator: str, folder: Path) -> list[tuple[float, float, float]]:
    """What a generator recorded of each request: begin, time to the first token, mean time between tokens; ms."""
    if generator == "own":
        run = RecordedRun.read(folder / "run")
        return [(r.due, r.ttft * 1e3, mean_itl(r)) for r in run.requests if r.error is None]
    if generator == "guidellm":
        report = json.loads((folder / "guidellm.json").read_text())
        requests = [one for benchmark in report["benchmarks"] for one in benchmark["requests"]["successful"]]
        return [(r["request_start_time"], r["time_to_first_token_ms"], r["inter_token_latency_ms"]) for r in requests]
    (file,) = (folder / "aiperf").rglob("profile_export.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    good = [one for one in lines if not one.get("error")]
    return [
        (
            one["metadata"]["request_start_ns"] / 1e9,
            one["metrics"]["time_to_first_token"]["value"],
            one["metrics"]["inter_token_latency"]["value"],
        )
        for one in good
    ]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99."""
    return {f"p{share}": round(float(np.percentile(values, share)), 3) for share in (50, 99)}


def run(generator: str, streams: int, events: int, seconds: int, path: Path | None) -> dict[str, Any]:
    """One generator at one number of streams."""
    step_ms = 1e3 * streams / events
    tokens = max(8, round(4e3 / step_ms))  # answers of about four seconds
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mock_words = ["--port", str(PORT), "--first-ms", str(FIRST_MS), "--step-ms", str(step_ms)]
        command = [sys.executable, "-m", "vllm_instant_loadtests.mock", *mock_words, "--truth", str(folder / "truth")]
        mock = subprocess.Popen(command)
        try:
            psutil.Process(mock.pid).cpu_affinity([cores[0]])
            time.sleep(3)
            words = GENERATORS[generator](streams, tokens, seconds, folder)
            offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
            environment = dict(os.environ) | offline
            if path is not None:
                environment["PYTHONPATH"] = f"{path}:{environment.get('PYTHONPATH', '')}"
            process = subprocess.Popen(["taskset", "-c", str(cores[-1]), *words], env=environment)
            used = cpu_seconds(process)
            if process.returncode:
                raise SystemExit(f"{generator} ended with {process.returncode}")
        finally:
            mock.terminate()
            mock.wait()
        sent = [json.loads(line)["sent"] for line in (folder / "truth").read_text().splitlines()]
        found = recorded(generator, folder)
    first = min(begin for begin, _, _ in found)
    kept = [one for one in found if one[0] >= first + WARM_UP and one[2] > 0]
    truth = [(one[-1][0] - one[0][0]) / (one[-1][1] - one[0][1]) * 1e3 for one in sent if len(one) > 1]
    return {
        "generator": generator,
        "streams": streams,
        "events_per_second": events,
        "requests": len(kept),
        "cpu_seconds": round(used, 2),
        "cpu_ms_per_stream_second": round(1e3 * used / streams / seconds, 3),
        "ttft_error_ms": percentiles([ttft - FIRST_MS for _, ttft, _ in kept]),
        "itl_sent_ms": percentiles(truth),
        "itl_recorded_ms": percentiles([itl for _, _, itl in kept]),
    }


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """CPU time of a process and all its descendants, until it ends."""
    known: dict[int, float] = {}
    while process.poll() is None:
        try:
            root = psutil.Process(process.pid)
            for one in [root, *root.children(recursive=True)]:
                times = one.cpu_times()
                known[one.pid] = max(known.get(one.pid, 0.0), times.user + times.system)
        except psutil.Error:
            pass
        time.sleep(0.2)
    return sum(known.values())


def main() -> None:
    """Run one generator, and add it to the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", choices=list(GENERATORS))
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--path", type=Path)
    options = parser.parse_args()
    found = run(options.generator, options.streams, options.events, options.seconds, options.path)
    print(found)
    write(RESULT, [found], "mock server", keys=("generator", "streams"))


if __name__ == "__main__":
    main()
