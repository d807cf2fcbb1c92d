"""The demo with more rounds, and its figures in a file: vLLM alone and ours on the demo's public chat model.

    .venv/bin/python benchmarks/demo.py [--starts 3] [--rounds 2] [--dtype float32] [--screenshot docs/demo.svg]

The three prompts of `vllm-instant demo`, one request at a time; the two servers take turns. Two processes of the same
server can differ in speed for as long as they live, so that each start of both servers is one sample: its rounds'
median. Seeds are the same for both servers, so that answers can be compared: ``equal_answers`` counts the
rounds in which both gave the same text.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import HERE, write
from rich.console import Console

from vllm_instant.tools.demo import session, setups
from vllm_instant.tools.measure.servers import Server, running
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval


def cell(starts: Sequence[session.Result], model: str, dtype: str) -> dict[str, Any]:
    """One prompt's figures, one result a start; times to first token in milliseconds."""
    speeds: dict[str, list[float]] = {"vllm": [], "ours": []}
    first: dict[str, list[float]] = {"vllm": [], "ours": []}
    for start in starts:
        for arm, answers in (("vllm", start.stock), ("ours", start.ours)):
            speeds[arm].append(statistics.median(answer.tokens_per_second for answer in answers))
            first[arm].append(1e3 * statistics.median(answer.ttft for answer in answers))
    task = starts[0].task
    return {
        "model": model,
        "dtype": dtype,
        "prompt": task.title,
        "temperature": task.temperature,
        "starts": len(starts),
        "rounds": sum(len(start.ours) for start in starts),
        "tokens_per_second": {arm: vars(median_interval(values)) for arm, values in speeds.items()},
        "ratio": vars(ratio_interval(speeds["ours"], speeds["vllm"])),
        "ttft_ms": {arm: vars(median_interval(values)) for arm, values in first.items()},
        "ratio_by_start": [round(a / b, 3) for a, b in zip(speeds["ours"], speeds["vllm"], strict=True)],
        "accepted": sum(start.accepted for start in starts),
        "proposed": sum(start.proposed for start in starts),
        "equal_answers": sum(start.equal for start in starts),
        "answer": starts[0].ours[0].text,
    }


def main() -> None:
    """Measure, print, write ``benchmarks/results/demo.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3, help="how often both servers are started")
    parser.add_argument("--rounds", type=int, default=2, help="answers to each prompt a start")
    parser.add_argument("--embedded", action="store_true", help="the repository's own models")
    parser.add_argument("--dtype", default="", help="number format of both servers; the model's own by default")
    parser.add_argument("--screenshot", type=Path, help="write what is printed as an image, SVG")
    parser.add_argument("--name", default="", help="the conditions of this run, where they are not the usual ones")
    parser.add_argument("--output", type=Path, default=HERE / "results/demo.json")
    options = parser.parse_args()
    began, console = time.monotonic(), Console(width=112, record=True)
    setup, note = setups.chosen(options.embedded, options.dtype)
    console.print(f"{note or setup.about} Prepared in {time.monotonic() - began:.0f} s.")
    starts = []
    for number in range(options.starts):
        with tempfile.TemporaryDirectory(prefix="demo-") as name:
            baseline = Server(setup.model, setup.baseline_arguments(), log=Path(name) / "vllm.log")
            ours = Server(setup.model, setup.our_arguments(), log=Path(name) / "ours.log")
            with running(baseline, ours):
                console.print(f"Start {number + 1}: both servers are ready after {time.monotonic() - began:.0f} s.")
                starts.append(session.converse(console, setup.tasks, baseline, ours, options.rounds))
        console.print(session._table(starts[-1]))
        measured = [cell(by_start, setup.name, options.dtype or "bfloat16") for by_start in zip(*starts, strict=True)]
        write(options.output, measured, options.name, ("model", "dtype", "prompt"), any_name=True)
    console.print(session.conditions(setup, options.rounds))
    if options.screenshot:
        console.save_svg(str(options.screenshot), title="vllm-instant demo")
    console.print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
