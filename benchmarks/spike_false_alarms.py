"""A/A: stock servers under steady traffic, nothing done to them; no run should have a spike.

    .venv/bin/python benchmarks/spike_false_alarms.py --seed SEED [--runs 10] [--life drafting] [--append]

Each run is 45 seconds of steady open-loop traffic, with prompts of its own, recorded and analysed as a load test is.
One server lives through all runs of a call. ``--keep FOLDER`` keeps what was recorded.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import chaos
from results import HERE, command, earlier, write
from rich.console import Console
from scipy.stats import beta

from vllm_instant.tools.measure.servers import running, terminable
from vllm_instant_loadtests.analysis import analyse_run

SECONDS = 45.0


def main() -> None:
    """Measure, print, write ``benchmarks/results/spike_false_alarms.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", required=True, help="of prompts and times")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--life", default="drafting", choices=list(chaos.LIVES))
    parser.add_argument("--append", action="store_true", help="keep what the output file has of earlier calls")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the recorded runs")
    parser.add_argument("--output", type=Path, default=HERE / "results/spike_false_alarms.json")
    options = parser.parse_args()
    console = Console()
    runs: list[dict[str, Any]] = []
    if options.append:
        runs = [run for entry in earlier(options.output) for run in entry["runs"]]
    with terminable(), tempfile.TemporaryDirectory(prefix="spikes-") as name:
        folder = options.keep or Path(name)
        target = chaos.server(options.life, folder / "logs")
        with running(target):
            stem = f"{options.life.replace(' ', '-')}-{options.seed}"
            chaos.play(target, chaos.undisturbed(options.life, 6.0, options.seed), folder / f"{stem}-settling", {})
            for number in range(options.runs):
                plan = chaos.undisturbed(options.life, SECONDS, f"{options.seed}/{number}")
                run = chaos.play(target, plan, folder / f"{stem}-{number}", {"scenario": {"name": "nothing"}})
                analysis = analyse_run(run)
                [server] = analysis.servers
                runs.append(
                    {
                        "life": options.life,
                        "seed": f"{options.seed}/{number}",
                        "command": command(),
                        "cores_used": run.about["cores_used"],
                        "spikes": [spike.plain() for spike in analysis.spikes],
                        "too_little": server.too_little,
                        "milliseconds": server.percentiles,
                        "tokens": server.tokens,
                    }
                )
                console.print(f"{options.life} {number}: {len(analysis.spikes)} spikes")
                write(options.output, [summary(runs)])
    console.print(", ".join(f"{key} {value}" for key, value in summary(runs).items() if key != "runs"))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How many runs got a spike; with the 95 % interval of that share (Clopper & Pearson 1934)."""
    count, alarms = len(runs), sum(bool(run["spikes"]) for run in runs)
    low = beta.ppf(0.025, alarms, count - alarms + 1) if alarms else 0.0
    high = beta.ppf(0.975, alarms + 1, count - alarms) if alarms < count else 1.0
    return {"runs_made": count, "runs_with_spikes": alarms, "share_95": [float(low), float(high)], "runs": runs}


if __name__ == "__main__":
    main()
