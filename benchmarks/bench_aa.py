"""A/A: `vllm-instant bench` beside itself. Three stock servers, of which one is called ours; no row may have a verdict.

    .venv/bin/python benchmarks/bench_aa.py [--runs 9] [--rounds 6] [--no-quality] [--append]

The short form runs against servers of the demo's small target, the three processes taking the roles by turns. Each call
starts new processes; ``--append`` adds its runs to those of earlier calls. What a run measured in rounds is also judged
with each of the other two servers in the place of ours (``other_roles``).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from results import HERE, earlier, write
from rich.console import Console

from vllm_instant.tools.bench.checkpoint import BenchCheckpoint
from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, OURS, SHORT, BenchPlan
from vllm_instant.tools.bench.rows import BenchRow, bench_rows
from vllm_instant.tools.bench.session import ExternalServers, run_bench
from vllm_instant.tools.demo import assets, widen_model
from vllm_instant.tools.measure.servers import Server, running, terminable

WORDS = ["--served-model-name", "demo", "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"]


def one_run(urls: Sequence[str], path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """One bench: what got a verdict, and how far the rows were from one."""
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
                    round(state.turns[number, users][arm].tokens / state.turns[number, users][arm].seconds, 2)
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

    turns = {place: recast(taken) for place, taken in state.turns.items()}
    return SimpleNamespace(arms=state.arms, turns=turns, served=recast(state.served), quality=None)


def false_verdicts(found: Sequence[BenchRow]) -> list[str]:
    """Rows that say better or worse."""
    judged = [(row, row.contrasts[OURS].verdict) for row in found if OURS in row.contrasts]
    return [f"{row.group}: {row.name}: {verdict}" for row, verdict in judged if verdict != "no difference"]


def main() -> None:
    """Measure, print, write ``benchmarks/results/bench_aa.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=SHORT["rounds"])
    parser.add_argument("--no-quality", action="store_true", help="only what is measured in rounds")
    parser.add_argument("--append", action="store_true", help="keep the runs of earlier calls")
    parser.add_argument("--output", type=Path, default=HERE / "results/bench_aa.json")
    options = parser.parse_args()
    given = {"rounds": options.rounds} | ({"texts": 0} if options.no_quality else {})
    kept = earlier(options.output) if options.append else []
    runs: list[dict[str, Any]] = []
    console = Console()
    with terminable(), tempfile.TemporaryDirectory(prefix="bench-aa-") as name:
        folder = Path(name)
        target = assets.prepare(size=widen_model.SMALL).target
        servers = [Server(target, WORDS, log=folder / f"stock{i}.log") for i in range(3)]
        with running(*servers):
            roles = itertools.cycle(itertools.permutations([server.url for server in servers]))
            for number, urls in zip(range(options.runs), roles, strict=False):
                runs.append(one_run(urls, folder / f"run{number}.jsonl", given))
                speed = runs[-1]["rows"]["concurrency 4: output tokens/s"]["effect"]
                console.print(
                    f"{len(kept) + len(runs)}: verdicts on {runs[-1]['false_verdicts'] or 'nothing'} (other roles: "
                    f"{runs[-1]['other_roles']}); output tokens/s "
                    f"{speed['mean']:.3f} [{speed['low']:.3f}, {speed['high']:.3f}]",
                    soft_wrap=True,
                    highlight=False,
                    markup=False,
                )
                write(options.output, [*kept, *runs])
    everything = [*kept, *runs]
    false = sum(bool(run["false_verdicts"]) for run in everything)
    console.print(f"{false} of {len(everything)} runs say better or worse somewhere")


if __name__ == "__main__":
    main()
