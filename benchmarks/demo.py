"""The demo with more rounds, and its figures in a file: vLLM alone and ours on the demo's public chat model.

    .venv/bin/python benchmarks/demo.py [--rounds 4] [--dtype float32] [--name CONDITIONS] [--screenshot docs/demo.svg]

The three prompts of `vllm-instant demo`, one request at a time; the two servers take turns. Seeds are the same for both
servers, so that answers can be compared: ``equal_answers`` counts the rounds in which both gave the same text.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from results import HERE, write
from rich.console import Console

from vllm_instant.tools.demo import session, setups
from vllm_instant.tools.measure.servers import Server, running
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval


def cell(result: session.Result, model: str, dtype: str) -> dict[str, Any]:
    """One prompt's figures; times to first token in milliseconds."""
    speeds = {
        arm: [answer.tokens_per_second for answer in answers]
        for arm, answers in (("vllm", result.stock), ("ours", result.ours))
    }
    first = {
        arm: [1e3 * answer.ttft for answer in answers]
        for arm, answers in (("vllm", result.stock), ("ours", result.ours))
    }
    return {
        "model": model,
        "dtype": dtype,
        "prompt": result.task.title,
        "temperature": result.task.temperature,
        "rounds": len(result.ours),
        "tokens_per_second": {arm: vars(median_interval(values)) for arm, values in speeds.items()},
        "ratio": vars(ratio_interval(speeds["ours"], speeds["vllm"])),
        "ttft_ms": {arm: vars(median_interval(values)) for arm, values in first.items()},
        "accepted": result.accepted,
        "proposed": result.proposed,
        "equal_answers": result.equal,
        "answer": result.ours[0].text,
    }


def main() -> None:
    """Measure, print, write ``benchmarks/results/demo.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--embedded", action="store_true", help="the repository's own models")
    parser.add_argument("--dtype", default="", help="number format of both servers; the model's own by default")
    parser.add_argument("--screenshot", type=Path, help="write what is printed as an image, SVG")
    parser.add_argument("--name", default="", help="the conditions of this run, where they are not the usual ones")
    parser.add_argument("--output", type=Path, default=HERE / "results/demo.json")
    options = parser.parse_args()
    began, console = time.monotonic(), Console(width=112, record=True)
    setup, note = setups.chosen(options.embedded, options.dtype)
    console.print(f"{note or setup.about} Prepared in {time.monotonic() - began:.0f} s.")
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        baseline = Server(setup.model, setup.baseline_arguments(), log=Path(name) / "vllm.log")
        ours = Server(setup.model, setup.our_arguments(), log=Path(name) / "ours.log")
        with running(baseline, ours):
            console.print(f"Both servers are ready after {time.monotonic() - began:.0f} s.")
            results = session.converse(console, setup.tasks, baseline, ours, options.rounds)
    console.print(session._table(results))
    console.print(session.conditions(setup, options.rounds))
    if options.screenshot:
        console.save_svg(str(options.screenshot), title="vllm-instant demo")
    console.print(f"{time.monotonic() - began:.0f} s in all")
    measured = [cell(result, setup.name, options.dtype or "bfloat16") for result in results]
    write(options.output, measured, options.name, ("model", "dtype", "prompt"), any_name=True)


if __name__ == "__main__":
    main()
