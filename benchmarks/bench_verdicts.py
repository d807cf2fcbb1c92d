"""How often `vllm-instant bench` finds a difference that is there, and one that is not.

    .venv/bin/python benchmarks/bench_verdicts.py simulated [--runs 300]
    .venv/bin/python benchmarks/bench_verdicts.py servers [--runs 9] [--rounds 6] [--no-quality]

``simulated``: rounds of three servers, two of them stock; processes differ in speed, the machine drifts, turns are
noisy, and the third server is faster by a known difference, or by none (``tests/support/simulated_verdicts.py``).
No server runs; it takes about a minute.

``servers``: A/A. The short form of the bench runs against three stock servers of the demo's small target, of which one
is called ours; no row may have a verdict. The processes take the roles in turn. Each call starts new processes and adds
its runs to those of earlier calls. What a run measured in rounds is also judged with each of the other two servers in
the place of ours (``other_roles``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import results
from rich.console import Console
from simulated_verdicts import DRIFT, PROCESS, ROUND, ROW, simulated_verdicts

from vllm_instant.tools.bench.checkpoint import BenchCheckpoint
from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, OURS, SHORT, BenchPlan
from vllm_instant.tools.bench.rows import BenchRow, bench_rows
from vllm_instant.tools.bench.session import ExternalServers, run_bench
from vllm_instant.tools.demo import assets, widen_model
from vllm_instant.tools.measure.servers import Server, running, terminable

WORDS = ["--served-model-name", "demo", "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"]
FALSE_ALARMS = [(0.0, 1, 6, 6), (0.0, 2, 6, 6)]
POWER = [
    (0.3, 1, 6, 1),
    (0.3, 2, 6, 1),
    (-0.3, 2, 6, 1),
    (0.1, 2, 6, 1),
    (0.1, 3, 9, 1),
    (-0.1, 3, 9, 1),
    (0.1, 4, 12, 1),
]


def simulate(runs: int, console: Console) -> dict[str, Any]:
    """How many of the simulated runs say better or worse, with and without a difference."""
    cells = []
    for effect, starts, rounds, count in [*FALSE_ALARMS, *POWER]:
        verdicts = [
            simulated_verdicts(effect, starts=starts, rounds=rounds, seed=seed, rows=count) for seed in range(runs)
        ]
        right = "better" if effect > 0 else "worse"
        cells.append(
            {
                "planted_difference": effect,
                "starts": starts,
                "rounds": rounds,
                "rows": count,
                "runs": runs,
                "runs_with_a_verdict": sum(bool(set(found) & {"better", "worse"}) for found in verdicts),
                "runs_with_the_right_verdict": sum(set(found) == {right} for found in verdicts) if effect else None,
            }
        )
        console.print(cells[-1], highlight=False)
    spreads = {"process": PROCESS, "process_by_row": ROW, "turn": ROUND, "drift_step": DRIFT}
    return {"standard_deviations": spreads, "cells": cells}


def one_run(urls: Sequence[str], path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """One run of the bench: the rows with a verdict, and each row's distance from one."""
    arms = ExternalServers(dict(zip((BASELINE, BASELINE_AGAIN, OURS), urls, strict=True)), {})
    plan = BenchPlan(**{**SHORT, **given})
    state = BenchCheckpoint(path, plan.setup(), arms.names)
    plan = replace(plan, salt=state.salt)
    run_bench(plan, arms, state, lambda text, done: None)
    found = bench_rows(plan, state, None, None)
    contrasts = {f"{row.group}: {row.name}": row.contrasts[OURS].plain() for row in found if OURS in row.contrasts}
    others = [(OURS, BASELINE_AGAIN, BASELINE), (BASELINE, OURS, BASELINE_AGAIN)]
    return {
        "false_verdicts": false_verdicts(found),
        "rows_judged": len(contrasts),
        "rows": {
            name: {key: contrast[key] for key in ("effect", "certain", "floor", "threshold")}
            for name, contrast in contrasts.items()
        },
        "tokens_per_second_by_round": {
            str(users): {
                arm: [
                    round(state.arm_rounds[number, users][arm].tokens / state.arm_rounds[number, users][arm].seconds, 2)
                    for number in range(plan.rounds)
                ]
                for arm in state.arms
            }
            for users in plan.concurrency
        },
        "other_roles": [false_verdicts(bench_rows(plan, in_roles(state, roles), None, None)) for roles in others],
    }


def in_roles(state: BenchCheckpoint, played_by: tuple[str, str, str]) -> Any:
    """The same rounds with other servers called stock, stock again and ours; without quality, which needs its stock."""
    roles = dict(zip((BASELINE, BASELINE_AGAIN, OURS), played_by, strict=True))

    def recast(by_arm: Mapping[str, Any]) -> dict[str, Any]:
        return {role: by_arm[player] for role, player in roles.items()}

    turns = {place: recast(taken) for place, taken in state.arm_rounds.items()}
    return SimpleNamespace(arms=state.arms, arm_rounds=turns, served=recast(state.served), quality=None)


def false_verdicts(found: Sequence[BenchRow]) -> list[str]:
    """Rows that say better or worse."""
    judged = [(row, row.contrasts[OURS].verdict) for row in found if OURS in row.contrasts]
    return [f"{row.group}: {row.name}: {verdict}" for row, verdict in judged if verdict in ("better", "worse")]


def serve(options: argparse.Namespace, console: Console) -> None:
    """Run the bench on three stock servers; the file is written after each run."""
    given = {"rounds": options.rounds} | ({"texts": 0} if options.no_quality else {})
    kept = measured_before(options.output)
    found: list[dict[str, Any]] = []
    with terminable(), tempfile.TemporaryDirectory(prefix="bench-aa-") as name:
        folder = Path(name)
        target = assets.prepare(size=widen_model.SMALL).target
        servers = [Server(target, WORDS, log=folder / f"stock{i}.log") for i in range(3)]
        with running(*servers):
            roles = itertools.cycle(itertools.permutations([server.url for server in servers]))
            for number, urls in zip(range(options.runs), roles, strict=False):
                found.append(one_run(urls, folder / f"run{number}.jsonl", given) | {"command": results.command()})
                speed = found[-1]["rows"]["concurrency 4: output tokens/s"]["effect"]
                console.print(
                    f"{len(kept) + len(found)}: verdicts on {found[-1]['false_verdicts'] or 'no row'} (other roles: "
                    f"{found[-1]['other_roles']}); output tokens/s "
                    f"{speed['mean']:.3f} [{speed['low']:.3f}, {speed['high']:.3f}]",
                    soft_wrap=True,
                    highlight=False,
                    markup=False,
                )
                results.write(options.output, [*kept, *found], "servers")
    everything = [*kept, *found]
    false = sum(bool(one["false_verdicts"]) for one in everything)
    console.print(f"{false} of {len(everything)} runs say better or worse in some row")


def measured_before(path: Path) -> list[dict[str, Any]]:
    """The runs of earlier calls."""
    earlier = json.loads(path.read_text())["runs"] if path.exists() else []
    return [one for part in earlier if part["name"] == "servers" for one in part["measured"]]


def main() -> None:
    """Measure one part, print, write ``benchmarks/results/bench_verdicts.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("simulated", "servers"))
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=SHORT["rounds"])
    parser.add_argument("--no-quality", action="store_true", help="only what is measured in rounds")
    parser.add_argument("--output", type=Path, default=results.HERE / "results/bench_verdicts.json")
    options = parser.parse_args()
    console = Console()
    if options.part == "servers":
        serve(options, console)
    else:
        results.write(options.output, simulate(options.runs, console), "simulated")


if __name__ == "__main__":
    main()
