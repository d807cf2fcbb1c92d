"""Whether spikes are found and rightly named: stock servers, disturbed on purpose at random known times.

    .venv/bin/python benchmarks/spike_attribution.py --seed SEED [--append] [--lives "drafting,few seats,little cache"]

Three kinds of stock vLLM server of the demo pair (a draft model with a fixed length; four seats; a KV cache of forty
blocks) get steady open-loop traffic. In between, at random times and in random order: creative traffic that the draft
model cannot foretell, bursts, long prompts, more long answers than the cache holds, pauses of the processes (SIGSTOP,
SIGCONT), storms of clients that hang up, and a load generator that sleeps. Each run is recorded as a load test is, and
analysed without a look at what was done.

A disturbance counts as found where a spike overlaps it and names its cause. A spike that overlaps a disturbance of its
cause is right, any other one is wrong: precision is the share of right spikes, recall the share of found disturbances.
``--append`` adds to earlier calls; ``--keep FOLDER`` keeps what was recorded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chaos
from results import HERE, command, earlier, write
from rich.console import Console
from rich.table import Table

from vllm_instant.tools.measure.servers import running, terminable
from vllm_instant_loadtests import causes
from vllm_instant_loadtests.analysis import RunAnalysis, analyse_run
from vllm_instant_loadtests.run_recorder import Disturbance, RecordedRun

TIMES = {"drafting": 2, "few seats": 2, "little cache": 1}
"""How often each cause of a life is done in one call; what only one life can do is done once more."""
SETTLING = 6.0


def wanted(life: str) -> list[str]:
    """The disturbances of one run."""
    listed = list(chaos.LIVES[life].causes) * TIMES[life]
    alone = {"drafting": (), "few seats": (), "little cache": (causes.MEMORY,) * 2}[life]
    return [*listed, *alone]


def judged(life: str, run: RecordedRun, analysis: RunAnalysis) -> dict[str, Any]:
    """What was done and what was found; times in seconds of the run."""
    spikes = analysis.spikes

    def overlap(event: Disturbance, began: float, ended: float) -> bool:
        return event.began < ended and began < event.ended

    events = []
    for event in sorted(run.events, key=lambda event: event.began):
        names = [spike.cause for spike in spikes if overlap(event, spike.began, spike.ended)]
        events.append(
            {
                "cause": event.cause,
                "note": event.note,
                "began": round(event.began, 2),
                "ended": round(event.ended, 2),
                "named": names,
                "hit": event.cause in names,
            }
        )
    found = []
    for spike in spikes:
        truths = [event.cause for event in run.events if overlap(event, spike.began, spike.ended)]
        found.append(spike.plain() | {"truth": truths, "right": spike.cause in truths})
        found[-1].pop("alternatives")
    return {"life": life, "seconds": run.about["segments"][0]["ended"], "events": events, "spikes": found}


def rates(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Precision and recall of each cause, and of all."""
    events = [event for run in runs for event in run["events"]]
    spikes = [spike for run in runs for spike in run["spikes"]]
    names = [cause for cause in (*causes.CAUSES, causes.UNKNOWN) if any(e["cause"] == cause for e in events)]
    names += sorted({spike["cause"] for spike in spikes} - set(names))
    rows = []
    for cause in [*names, "all"]:
        done = [event["hit"] for event in events if cause in ("all", event["cause"])]
        named = [spike["right"] for spike in spikes if cause in ("all", spike["cause"])]
        rows.append(
            {
                "cause": cause,
                "events": len(done),
                "found_and_named": sum(done),
                "spikes_named_so": len(named),
                "rightly": sum(named),
                "recall": sum(done) / len(done) if done else None,
                "precision": sum(named) / len(named) if named else None,
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For a terminal."""
    shown = Table(title="Spikes of disturbed stock servers")
    for name in ("cause", "events", "found and named", "recall", "spikes named so", "rightly", "precision"):
        shown.add_column(name, justify="left" if name == "cause" else "right")
    for row in rows:
        recall, precision = ("–" if row[name] is None else f"{row[name]:.2f}" for name in ("recall", "precision"))
        shown.add_row(
            row["cause"],
            str(row["events"]),
            str(row["found_and_named"]),
            recall,
            str(row["spikes_named_so"]),
            str(row["rightly"]),
            precision,
        )
    return shown


def main() -> None:
    """Measure, print, write ``benchmarks/results/spike_attribution.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", required=True, help="of prompts, times and order")
    parser.add_argument("--lives", default=",".join(chaos.LIVES))
    parser.add_argument("--append", action="store_true", help="keep what the output file has of earlier calls")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the recorded runs")
    parser.add_argument("--output", type=Path, default=HERE / "results/spike_attribution.json")
    options = parser.parse_args()
    console = Console()
    runs: list[dict[str, Any]] = []
    if options.append:
        runs = [run for entry in earlier(options.output) for run in entry["runs"]]
    with terminable(), tempfile.TemporaryDirectory(prefix="spikes-") as name:
        folder = options.keep or Path(name)
        for life in options.lives.split(","):
            target = chaos.server(life, folder / "logs")
            with running(target):
                stem = f"{life.replace(' ', '-')}-{options.seed}"
                settling = chaos.undisturbed(life, SETTLING, f"{options.seed}/settling")
                chaos.play(target, settling, folder / f"{stem}-settling", {})
                plan = chaos.disturbed(life, wanted(life), f"{options.seed}/{life}")
                run = chaos.play(target, plan, folder / stem, {"scenario": {"name": f"chaos: {life}"}})
            found = judged(life, run, analyse_run(run)) | {"seed": options.seed, "command": command()}
            found["cores_used"] = run.about["cores_used"]
            runs.append(found)
            hits = sum(event["hit"] for event in found["events"])
            console.print(f"{life}: {hits} of {len(found['events'])} found and named in {plan.seconds:.0f} s")
            write(options.output, [{"by_cause": rates(runs), "runs": runs}])
    console.print(table(rates(runs)), width=140)


if __name__ == "__main__":
    main()
