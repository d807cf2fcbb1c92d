"""A/A: `vllm-instant bench` beside itself. Three stock servers, of which one is called ours; no row may have a verdict.

    .venv/bin/python benchmarks/bench_aa.py [--runs 7] [--append]

The short form runs against servers of the demo's small target, the three processes taking the roles by turns. Each call
starts new processes; ``--append`` adds its runs to those of earlier calls.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import HERE, earlier, write
from rich.console import Console

from vllm_instant.demo import assets, expand
from vllm_instant.evidence.servers import Server, running

WORDS = ["--served-model-name", "demo", "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"]


def one_run(urls: tuple[str, ...], output: Path) -> dict[str, Any]:
    """One bench, boiled down: what got a verdict, and how far the rows were from one."""
    roles = ["--stock", urls[0], "--stock-again", urls[1], "--ours", urls[2]]
    command = [sys.executable, "-m", "vllm_instant.cli", "bench", *roles, "--short", "--output", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = json.loads(output.with_suffix(".json").read_text())
    judged = {f"{row['group']}: {row['name']}": row["contrasts"].get("ours") for row in record["rows"]}
    contrasts = {name: contrast for name, contrast in judged.items() if contrast is not None}
    return {
        "false_verdicts": [name for name, contrast in contrasts.items() if contrast["verdict"] != "no difference"],
        "rows_judged": len(contrasts),
        "rows": {
            name: {key: contrast[key] for key in ("effect", "certain", "floor", "threshold")}
            for name, contrast in contrasts.items()
        },
        "tokens_per_second_by_round": record["tokens_per_second_by_round"],
    }


def main() -> None:
    """Measure, print, write ``benchmarks/results/bench_aa.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--append", action="store_true", help="keep the runs of earlier calls")
    parser.add_argument("--output", type=Path, default=HERE / "results/bench_aa.json")
    options = parser.parse_args()
    runs = earlier(options.output) if options.append else []
    console = Console()
    with tempfile.TemporaryDirectory(prefix="bench-aa-") as name:
        folder = Path(name)
        target = assets.prepare(size=expand.SMALL).target
        servers = [Server(target, WORDS, log=folder / f"stock{i}.log") for i in range(3)]
        with running(*servers):
            roles = itertools.cycle(itertools.permutations([server.url for server in servers]))
            for number, urls in zip(range(options.runs), roles, strict=False):
                runs.append(one_run(urls, folder / f"run{number}"))
                speed = runs[-1]["rows"]["concurrency 4: output tokens/s"]["effect"]
                console.print(
                    f"{len(runs)}: verdicts on {runs[-1]['false_verdicts'] or 'nothing'}; output tokens/s "
                    f"{speed['mean']:.3f} [{speed['low']:.3f}, {speed['high']:.3f}]",
                    soft_wrap=True,
                    highlight=False,
                )
                write(options.output, runs)
    false = sum(bool(run["false_verdicts"]) for run in runs)
    console.print(f"{false} of {len(runs)} runs say better or worse somewhere")


if __name__ == "__main__":
    main()
