"""How much vLLM and vllm-instant carry on this machine, and whether the search that says so can be trusted.

    .venv/bin/python benchmarks/capacity.py search SCENARIO [--servers vllm,ours] [--minutes 3] [--folder FOLDER]
    .venv/bin/python benchmarks/capacity.py sweep SCENARIO --rates R1,R2,… [--servers vllm,ours] [--folder FOLDER]
    .venv/bin/python benchmarks/capacity.py simulated [--runs 100]

``search``: `vllm-instant loadtest capacity` on the demo's models, or SmolLM2 (``facts as JSON``), with servers in
turn: vLLM, vLLM again (A/A), ours. A call ends after some minutes; the next one continues with new server processes in
the same folder.
``sweep``: the check, a plain sweep over fixed rates; its capacity is where the measured shares cross the goals (linear
between rates). ``simulated``: queues with a known capacity (M/M/1): how often the interval contains it, and how
often two equal servers are called different.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results import HERE, write  # also makes the tests' support modules importable

# isort: split
from queue_servers import exact_capacity, probe

from vllm_instant.tools.measure.servers import stop_all
from vllm_instant_loadtests.capacity import CapacityPlan, search_capacity
from vllm_instant_loadtests.capacity_search import CapacitySearch, compare_capacity
from vllm_instant_loadtests.launcher import DEMO, SMOLLM2, scenario_servers
from vllm_instant_loadtests.scenario import load

SIMULATED, MEASURED = HERE / "results/capacity.json", HERE / "results/capacity_servers.json"
SERVERS = {
    "vllm": '[[servers]]\nname = "vllm"\n',
    "vllm-again": '[[servers]]\nname = "vllm-again"\n',
    "ours": '[[servers]]\nname = "ours"\ninstant = true\n',
}
ENGINE = "[vllm]\nmax_num_seqs = 32\nmax_model_len = 1024\nenforce_eager = true\n"


@dataclass(frozen=True)
class CarriedTraffic:
    """One kind of traffic and its goals."""

    prompts: str
    rate: float
    """Requests, or sessions, per second of the first probe."""
    traffic: str
    """Further keys of the scenario's traffic."""
    goals: Sequence[str]
    model: str = DEMO
    probe_seconds: float = 8.0


SCENARIOS = {
    "short answers": CarriedTraffic("structured", 4.0, "max_tokens = [12, 24]", ("ttft_p95_ms=500", "itl_p99_ms=80")),
    "chat": CarriedTraffic("code", 1.5, "max_tokens = [48, 80]", ("ttft_p95_ms=500", "itl_p99_ms=80")),
    "conversations": CarriedTraffic(
        "free",
        1.0,
        "max_tokens = [12, 24]\n[traffic.session]\nturns = [2, 4]\nthink_seconds = [0.5, 1.5]",
        ("ttft_p95_ms=500", "itl_p99_ms=80"),
    ),
    "facts as JSON": CarriedTraffic(
        "extract", 0.6, "max_tokens = [16, 32]", ("ttft_p95_ms=1500", "itl_p99_ms=400"), SMOLLM2, 20.0
    ),
}
"""By name."""


def scenario_file(name: str, names: Sequence[str], folder: Path) -> Path:
    """The scenario as a file."""
    carried = SCENARIOS[name]
    file = folder / f"{name.replace(' ', '-')}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    head = f'title = "{name.capitalize()}"\nseconds = 60\nwarm_up_seconds = 4\n\n[[traffic]]\nkind = "{name}"\n'
    servers = "".join(SERVERS[server] for server in names)
    file.write_text(
        f'{head}prompts = "{carried.prompts}"\nrate = {carried.rate}\n{carried.traffic}\n\n{servers}{ENGINE}'
    )
    return file


def run(name: str, names: Sequence[str], folder: Path, minutes: float, rates: str | None) -> dict[str, Any]:
    """One call of the command; returns what it wrote. The servers start at once, which is faster on two cores."""
    output = folder / "-".join([*name.split(), *names, *(["sweep"] if rates else [])])
    file = scenario_file(name, names, folder)
    began = time.monotonic()
    servers, _ = scenario_servers(load(file), SCENARIOS[name].model, None, [], output / "logs")
    try:
        for server in servers.values():
            server.launch()
        for server in servers.values():
            server.wait()
        words = [f"--goal={goal}" for goal in SCENARIOS[name].goals]
        words += [word for server in names for word in ("--url", f"{server}={servers[server].url}")]
        words += [
            "--probe-seconds",
            str(SCENARIOS[name].probe_seconds),
            "--max-minutes",
            str(minutes),
            "--output",
            str(output),
        ]
        words += ["--sweep", rates] if rates else []
        cli = [sys.executable, "-m", "vllm_instant.tools.cli", "loadtest", "capacity"]
        done = subprocess.run([*cli, str(file), *words], check=False)
    finally:
        stop_all(*servers.values())
    if done.returncode not in (0, 1):
        raise SystemExit(done.returncode)
    timing = output / "minutes.json"
    spent = json.loads(timing.read_text()) if timing.exists() else []
    timing.write_text(json.dumps([*spent, round((time.monotonic() - began) / 60, 2)]))
    found = json.loads((output / "capacity.json").read_text())
    return found | {"minutes": json.loads(timing.read_text())}


def crossing(server: dict[str, Any]) -> float | None:
    """The rate at which the worst goal of a sweep is crossed, linear between neighbouring rates."""
    targets = {"ttft_p95_ms": 0.95, "itl_p99_ms": 0.99, "attain": 0.95}
    probes = sorted(server["probes"], key=lambda one: one["rate"])
    margins = [min(good / total - targets[goal] for goal, (good, total) in one["counts"].items()) for one in probes]
    for place in range(1, len(probes)):
        low, high = margins[place - 1], margins[place]
        if low >= 0 > high:
            share = low / (low - high)
            return float(probes[place - 1]["rate"] + share * (probes[place]["rate"] - probes[place - 1]["rate"]))
    return None


def cell(name: str, found: dict[str, Any], way: str) -> dict[str, Any]:
    """A row of the result file."""
    return {
        "scenario": name,
        "model": SCENARIOS[name].model,
        "way": way,
        "pair": ",".join(server["server"] for server in found["servers"]),
        "goals": found["plan"]["goals"],
        "minutes": found["minutes"],
        "servers": [
            {
                **{key: one[key] for key in ("server", "rate", "users", "deciding_goal", "finished", "bounded")},
                "probes": [
                    {key: one_probe[key] for key in ("rate", "requests", "goodput", "counts", "stopped")}
                    for one_probe in one["probes"]
                ],
                **({"crossing": crossing(one)} if way == "sweep" else {}),
            }
            for one in found["servers"]
        ],
        "comparisons": [
            {key: one[key] for key in ("ours", "theirs", "sentence", "effect", "verdict")}
            for one in found["comparisons"]
        ],
    }


def simulated(runs: int) -> dict[str, Any]:
    """Coverage of the interval, and verdicts of equal and of different servers."""
    plan = CapacityPlan(["e2e_p95_ms=500"], precision=0.10, max_probes=40)
    goals = plan.share_goals
    cells = []
    for faster in (1.0, 1.3):
        truth = exact_capacity(30.0, goals[0])
        rates = {"a": 30.0, "b": 30.0 + (faster - 1) * truth}
        inside = counted = probes = 0
        verdicts, ratios = [], 0
        for seed in range(runs):
            random = np.random.default_rng(seed)
            searches = {server: CapacitySearch(goals, 5.0, plan.limits) for server in rates}
            search_capacity(
                plan,
                searches,
                lambda server, rate, _, random=random, rates=rates: probe(
                    server, rate, rates[server], goals, random, 20.0
                ),
                seed=str(seed),
            )
            for server, search in searches.items():
                found, exact = search.estimate(), exact_capacity(rates[server], goals[0])
                inside += found.low <= exact <= found.high
                counted, probes = counted + 1, probes + len(search.probes)
            contrast = compare_capacity(searches)["b", "a"]
            verdicts.append(contrast.verdict)
            ratios += contrast.effect.low <= faster <= contrast.effect.high
        cells.append(
            {
                "true_ratio": faster,
                "runs": runs,
                "intervals_with_the_truth": inside / counted,
                "ratio_intervals_with_the_truth": ratios / runs,
                "probes": probes / counted,
                "verdicts": {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
            }
        )
        print(cells[-1])
    return {"cells": cells}


def main() -> None:
    """Run, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "sweep", "simulated"))
    parser.add_argument("scenario", nargs="?", choices=list(SCENARIOS))
    parser.add_argument("--servers", default="vllm,ours")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--rates")
    parser.add_argument("--folder", type=Path, default=Path("loadtest-capacity"))
    parser.add_argument("--runs", type=int, default=100)
    options = parser.parse_args()
    if options.what == "simulated":
        write(SIMULATED, simulated(options.runs), "simulated queues")
        return
    if options.scenario is None or (options.what == "sweep") != bool(options.rates):
        parser.error("search and sweep need a SCENARIO, sweep also --rates")
    names = options.servers.split(",")
    found = run(options.scenario, names, options.folder, options.minutes, options.rates)
    write(MEASURED, [cell(options.scenario, found, options.what)], "servers", keys=("scenario", "way", "pair"))


if __name__ == "__main__":
    main()
