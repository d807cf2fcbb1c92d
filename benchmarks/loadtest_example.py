"""The example report: creative text takes over; stock vLLM with a fixed draft length and without drafts, and ours.

.venv/bin/python benchmarks/loadtest_example.py

Runs ``vllm-instant loadtest draft-collapse`` with the demo's models, twice with other prompts; the first report becomes
``docs/loadtest_example.html``. The result file has that report's numbers and, of both runs together: each server's 99th
percentiles under creative text over its own under the structured text before, and those of ours over those of the
server without drafts, to which all text is the same. Ratios have 95 % bootstrap intervals, whole requests drawn anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import write

from vllm_instant_loadtests.run_recorder import RecordedRequest, RecordedRun

HERE = Path(__file__).resolve().parent
BEFORE, AFTER = "structured", "creative"
PLAIN, OURS = "plain", "ours"
DRAWS = 2000


def main() -> None:
    """Run, judge, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--recorded", type=Path, nargs="+", help="judge these recorded runs instead of making any")
    parser.add_argument("--keep", type=Path, help="keep the raw runs here")
    parser.add_argument("--output", type=Path, default=HERE / "results/loadtest_example.json")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs/loadtest_example.html")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loadtest-example-") as name:
        folders = options.recorded or [play(Path(name), number) for number in range(options.runs)]
        for folder in options.recorded or ():
            loadtest(None, "--analyse", str(folder))
        if options.keep:
            shutil.copytree(name, options.keep, dirs_exist_ok=True)
        runs = [RecordedRun.read(folder) for folder in folders]
        report: dict[str, Any] = json.loads((folders[0] / "report.json").read_text())
        shutil.copy(folders[0] / "report.html", options.page)
    report["run"].pop("environment_info", None)
    requests = {
        server["name"]: [request for run in runs for request in run.of(server["name"]).requests]
        for server in runs[0].about["servers"]
    }
    own = {server: compared(of_kind(found, BEFORE), of_kind(found, AFTER)) for server, found in requests.items()}
    plain = {kind: compared(of_kind(requests[PLAIN], kind), of_kind(requests[OURS], kind)) for kind in (BEFORE, AFTER)}
    for title, tables in (("creative / structured", own), ("ours / plain", plain)):
        for row, table in tables.items():
            for metric, found in table.items():
                times = f"{found['before_ms']:.0f} and {found['after_ms']:.0f} ms"
                print(f"p99 {metric}, {title}, {row}: {times}, {shown(found)}")
    write(options.output, {"runs": len(runs), "beside_itself": own, "ours_over_plain": plain, "report": report})


def play(folder: Path, number: int) -> Path:
    """Make a run; returns its folder."""
    # Relative, so that the record does not name this machine's folders.
    name = f"loadtest-example-{number}"
    loadtest(folder, "draft-collapse", "--seed", str(number), "--output", name)
    return folder / name


def loadtest(folder: Path | None, *words: str) -> None:
    """Call the command."""
    subprocess.run([sys.executable, "-m", "vllm_instant.tools.cli", "loadtest", *words], check=True, cwd=folder)


def of_kind(requests: Sequence[RecordedRequest], kind: str) -> list[RecordedRequest]:
    """The requests of one kind of traffic."""
    return [request for request in requests if request.kind == kind]


def compared(before: Sequence[RecordedRequest], after: Sequence[RecordedRequest]) -> dict[str, Any]:
    """99th percentiles of some requests over those of others."""
    return {
        "ITL": ratio([itl(r) for r in before], [itl(r) for r in after]),
        "gap": ratio([gaps(r) for r in before], [gaps(r) for r in after]),
        "TTFT": ratio([np.array([r.ttft]) for r in before], [np.array([r.ttft]) for r in after]),
    }


def ratio(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict[str, float]:
    """Of the 99th percentiles; one array of values a request."""
    random = np.random.default_rng(0)

    def drawn(values: Sequence[np.ndarray]) -> float:
        chosen = random.integers(0, len(values), len(values))
        return p99([values[i] for i in chosen])

    ratios = [drawn(after) / drawn(before) for _ in range(DRAWS)]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {
        "before_ms": p99(before) * 1e3,
        "after_ms": p99(after) * 1e3,
        "ratio": p99(after) / p99(before),
        "low": float(low),
        "high": float(high),
    }


def p99(values: Sequence[np.ndarray]) -> float:
    """Of all values together; failed requests have none."""
    return float(np.nanpercentile(np.concatenate(values), 99))


def itl(request: RecordedRequest) -> np.ndarray:
    """One entry a token after the first arrival: tokens that arrive together share the time since those before."""
    if len(request.arrivals) < 2:
        return np.empty(0)
    times, totals = np.array(request.arrivals).T
    tokens = np.diff(totals)
    return np.repeat(np.diff(times) / tokens, tokens.astype(int))


def gaps(request: RecordedRequest) -> np.ndarray:
    """Seconds between arrivals, however many tokens they bring: for how long nothing moved."""
    return np.diff([when for when, _ in request.arrivals])


def shown(found: dict[str, float]) -> str:
    """A ratio with its interval."""
    return f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


if __name__ == "__main__":
    main()
