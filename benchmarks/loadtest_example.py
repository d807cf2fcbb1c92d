"""The example report: creative text takes over; stock vLLM with a fixed draft length, ours, and each beside itself.

.venv/bin/python benchmarks/loadtest_example.py

Runs ``vllm-instant loadtest draft-collapse`` with the demo's models; its report becomes ``docs/loadtest_example.html``.
The result file has the report's numbers and, for each server, how its 99th percentiles under creative text compare with
those under the structured text before: ratios with 95 % bootstrap intervals, whole requests drawn anew.
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

from vllm_instant_loadtests.recording import Request, Run

HERE = Path(__file__).resolve().parent
BEFORE, AFTER = "structured", "creative"
DRAWS = 2000


def main() -> None:
    """Run, judge, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="judge this recorded run instead of making one")
    parser.add_argument("--keep", type=Path, help="keep the raw run here")
    parser.add_argument("--output", type=Path, default=HERE / "results/loadtest_example.json")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs/loadtest_example.html")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loadtest-example-") as name:
        folder = options.run or Path(name) / "loadtest-example"
        words = ["--analyse", str(folder)] if options.run else ["draft-collapse", "--output", folder.name]
        where = None if options.run else name  # relative, so that the record does not name this machine's folders
        subprocess.run([sys.executable, "-m", "vllm_instant.cli", "loadtest", *words], check=True, cwd=where)
        if options.keep:
            shutil.copytree(folder, options.keep, dirs_exist_ok=True)
        run = Run.read(folder)
        report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        shutil.copy(folder / "report.html", options.page)
    own = {server["name"]: beside_itself(run.of(server["name"]).requests) for server in run.about["servers"]}
    for server, found in own.items():
        for metric, ratio in found.items():
            print(f"{server}: p99 {metric} {ratio['before_ms']:.0f} → {ratio['after_ms']:.0f} ms, {shown(ratio)}")
    report["run"].pop("circumstances", None)
    write(options.output, {"beside_itself": own, "report": report})


def beside_itself(requests: Sequence[Request]) -> dict[str, Any]:
    """99th percentiles under creative text over those under structured text."""
    before, after = ([r for r in requests if r.kind == kind] for kind in (BEFORE, AFTER))
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


def itl(request: Request) -> np.ndarray:
    """One entry a token after the first arrival: tokens that arrive together share the time since those before."""
    if len(request.arrivals) < 2:
        return np.empty(0)
    times, totals = np.array(request.arrivals).T
    tokens = np.diff(totals)
    return np.repeat(np.diff(times) / tokens, tokens.astype(int))


def gaps(request: Request) -> np.ndarray:
    """Seconds between arrivals, however many tokens they bring: for how long nothing moved."""
    return np.diff([when for when, _ in request.arrivals])


def shown(found: dict[str, float]) -> str:
    """A ratio with its interval."""
    return f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


if __name__ == "__main__":
    main()
