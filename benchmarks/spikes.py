"""Whether load tests find spikes and name their causes: stock servers, disturbed on purpose at random known times.

    .venv/bin/python benchmarks/spikes.py attribution --seed SEED [--lives "drafting,few seats,little cache"]
    .venv/bin/python benchmarks/spikes.py alarms --seed SEED [--runs 10] [--lives drafting]
    .venv/bin/python benchmarks/spikes.py machine --seed SEED [--runs 10]

``attribution``: three kinds of stock vLLM server of the demo pair (a draft model with a fixed length; four slots; a KV
cache of forty blocks) get steady open-loop traffic. In between, at random times and in random order: creative traffic
that the draft model cannot predict, bursts, long prompts, more long answers than the cache holds, pauses of the
processes (SIGSTOP, SIGCONT), storms of clients that disconnect, and a load generator that sleeps
(``disturbances.py``). Each run is recorded as a load test is, and analysed without knowing the disturbances.

A disturbance counts as found where a spike overlaps it and names its cause. A spike that overlaps a disturbance of its
cause is right, any other one is wrong: precision is the share of right spikes, recall the share of found disturbances.

``alarms``: runs of 45 seconds of the same steady traffic without a disturbance; no run should have a spike. One server
lives through all runs of a call.

``machine``: causes outside of the server cannot all be planted on every machine (a hypervisor that takes time, a GPU
that is hot). Simulated runs (``vllm_instant_loadtests.simulated``) have each of them at a random time with a random
strength, as many times as ``--runs`` says, and as many runs have no disturbance.

Runs are added to those of earlier calls; ``--keep FOLDER`` keeps what was recorded.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import disturbances
from results import HERE, command, write
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from vllm_instant.tools.measure.servers import running, terminable
from vllm_instant_loadtests import causes, host_causes
from vllm_instant_loadtests.analysis import RunAnalysis, analyse_run
from vllm_instant_loadtests.run_recorder import Disturbance, RecordedRun
from vllm_instant_loadtests.simulated import SERVER, simulate_run

TIMES = {"drafting": 2, "few seats": 2, "little cache": 1}
"""How often a call provokes each cause, by kind of server; what only one kind can show is provoked once more."""
SETTLING = 6.0
SECONDS = 45.0
ATTRIBUTION, ALARMS, MACHINE = "attribution", "false alarms", "the machine, simulated"


def wanted(life: str) -> list[str]:
    """The disturbances of one run."""
    listed = list(disturbances.LIVES[life].causes) * TIMES[life]
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


def attribution(options: argparse.Namespace, folder: Path, console: Console) -> None:
    """Disturb each kind of server, and judge what the analysis says."""
    runs = runs_before(options.output, ATTRIBUTION)
    for life in (options.lives or ",".join(disturbances.LIVES)).split(","):
        target = disturbances.server(life, folder / "logs")
        with running(target):
            stem = f"{life.replace(' ', '-')}-{options.seed}"
            settling = disturbances.undisturbed(life, SETTLING, f"{options.seed}/settling")
            disturbances.play(target, settling, folder / f"{stem}-settling", {})
            plan = disturbances.disturbed(life, wanted(life), f"{options.seed}/{life}")
            run = disturbances.play(target, plan, folder / stem, {"scenario": {"name": f"disturbances: {life}"}})
        found = judged(life, run, analyse_run(run)) | {"seed": options.seed, "command": command()}
        found["cores_used"] = run.about["cores_used"]
        runs.append(found)
        hits = sum(event["hit"] for event in found["events"])
        console.print(f"{life}: {hits} of {len(found['events'])} found and named in {plan.seconds:.0f} s")
        write(options.output, [{"by_cause": rates(runs), "runs": runs}], ATTRIBUTION)
    console.print(table(rates(runs)), width=140)


def alarms(options: argparse.Namespace, folder: Path, console: Console) -> None:
    """Count spikes of runs without a disturbance."""
    runs, life = runs_before(options.output, ALARMS), options.lives or "drafting"
    target = disturbances.server(life, folder / "logs")
    with running(target):
        stem = f"{life.replace(' ', '-')}-{options.seed}"
        disturbances.play(
            target, disturbances.undisturbed(life, SETTLING, options.seed), folder / f"{stem}-settling", {}
        )
        for number in range(options.runs):
            plan = disturbances.undisturbed(life, SECONDS, f"{options.seed}/{number}")
            run = disturbances.play(target, plan, folder / f"{stem}-{number}", {"scenario": {"name": "undisturbed"}})
            analysis = analyse_run(run)
            [server] = analysis.servers
            runs.append(
                {
                    "life": life,
                    "seed": f"{options.seed}/{number}",
                    "command": command(),
                    "cores_used": run.about["cores_used"],
                    "spikes": [spike.plain() for spike in analysis.spikes],
                    "too_little": server.too_little,
                    "milliseconds": server.percentiles,
                    "tokens": server.tokens,
                }
            )
            console.print(f"{life} {number}: {len(analysis.spikes)} spikes")
            write(options.output, [summary(runs)], ALARMS)
    console.print(", ".join(f"{key} {value}" for key, value in summary(runs).items() if key != "runs"))


def machine(options: argparse.Namespace, folder: Path, console: Console) -> None:
    """Simulate causes of the machine, and runs without any."""
    choose = random.Random(options.seed)
    runs, alarms_found = [], 0
    for cause in [None, *host_causes.HOST_CAUSES]:
        for _ in range(options.runs):
            began = choose.uniform(20.0, 40.0)
            events = [Disturbance(SERVER, cause, began, began + choose.uniform(4.0, 8.0))] if cause else []
            run = simulate_run(60, events, slower=choose.uniform(1.6, 3.0), seed=choose.getrandbits(32))
            analysis = analyse_run(run)
            if cause is None:
                alarms_found += bool(analysis.spikes)
            else:
                runs.append(judged("simulated", run, analysis))
        console.print(f"{cause}: {len(runs)} runs, {alarms_found} false alarms")
    made = {"by_cause": rates(runs), "undisturbed": options.runs, "undisturbed_with_spikes": alarms_found}
    write(options.output, [made], MACHINE)
    console.print(table(rates(runs)), width=140)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How many runs had a spike, with the 95 % interval of that share (Clopper & Pearson 1934)."""
    count, false = len(runs), sum(bool(run["spikes"]) for run in runs)
    share = binomtest(false, count).proportion_ci()
    return {"runs_made": count, "runs_with_spikes": false, "share_95": [share.low, share.high], "runs": runs}


def runs_before(path: Path, part: str) -> list[dict[str, Any]]:
    """The runs of earlier calls."""
    earlier = json.loads(path.read_text())["runs"] if path.exists() else []
    return [run for one in earlier if one["name"] == part for cell in one["measured"] for run in cell["runs"]]


def main() -> None:
    """Measure one part, print, write ``benchmarks/results/spikes.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("attribution", "alarms", "machine"))
    parser.add_argument("--seed", required=True, help="of prompts, times and order")
    parser.add_argument("--lives", default=None, help=f"kinds of server, of {', '.join(disturbances.LIVES)}")
    parser.add_argument("--runs", type=int, default=10, help="runs without a disturbance; of machine, per cause")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the recorded runs")
    parser.add_argument("--output", type=Path, default=HERE / "results/spikes.json")
    options = parser.parse_args()
    part = {"attribution": attribution, "alarms": alarms, "machine": machine}[options.part]
    with terminable(), tempfile.TemporaryDirectory(prefix="spikes-") as name:
        part(options, options.keep or Path(name), Console())


if __name__ == "__main__":
    main()
