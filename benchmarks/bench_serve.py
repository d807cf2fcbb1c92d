"""vLLM's own client, ``vllm bench serve``, against vLLM alone and against ours, in turn.

    .venv/bin/python benchmarks/bench_serve.py [--pairs 5] [--prompts mixed] [--users 4]        # 6 minutes

Two servers of one model, ours with the default deployment. In each pair the client sends the same chat prompts to both,
the first server alternating; the prompts of a pair occur in no other one. Figures are those of the client's own file.

The largest lengths of answers differ (``--spread``). With equal ones (``--spread 0``) all users of vLLM alone go in
step: they begin and end together, and no prompt is ever read between two tokens of another user. Drafts end that, as
different lengths do, and p99 between messages then holds prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_models import SMOLLM2, BenchModel, add_model_option, chosen
from results import HERE, write
from rich.console import Console

from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.servers import Server, running, serving_environment, settle
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval

SERVED = "demo"
VLLM, OURS = "vllm", "ours"
FIGURES = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms", "mean_tpot_ms")
"""Names in the client's result file."""
KEYS = ("model", "prompts", "users", "spread")


def client_command(server: Server, model: BenchModel, prompts: Path, result: Path, users: int, count: int) -> list[str]:
    """The words of ``vllm bench serve``."""
    return [
        *(str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--backend", "openai"),
        *("--base-url", server.url, "--endpoint", "/v1/completions", "--model", SERVED),
        *("--tokenizer", str(model.target), "--dataset-name", "custom", "--dataset-path", str(prompts)),
        *("--skip-chat-template", "--custom-output-len", "-1", "--disable-shuffle", "--num-prompts", str(count)),
        *("--max-concurrency", str(users), "--temperature", "0", "--disable-tqdm"),
        *(
            "--percentile-metrics",
            "ttft,tpot,itl",
            "--metric-percentiles",
            "50,99",
            "--save-result",
            "--result-dir",
            str(result.parent),
        ),
        *("--result-filename", result.name),
    ]


def ask(command: Sequence[str], result: Path) -> dict[str, float]:
    """The figures of one run of the client; ends the benchmark where it fails."""
    settle()
    done = subprocess.run(command, env=serving_environment(), capture_output=True, text=True, check=False)
    if done.returncode or not result.exists():
        raise SystemExit(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-2000:]}")
    found = json.loads(result.read_text())
    if found["completed"] != found["num_prompts"]:
        raise SystemExit(f"{found['completed']} of {found['num_prompts']} requests were answered")
    return {name: float(found[name]) for name in FIGURES}


def write_prompts(path: Path, prompts: Sequence[PromptSpec], tokens: int, spread: float) -> None:
    """The client's form of prompts, with lengths up to ``spread`` of ``tokens`` shorter or longer."""
    lengths = random.Random(path.name)
    entries = [
        {"prompt": prompt.text, "output_tokens": round(tokens * lengths.uniform(1 - spread, 1 + spread))}
        for prompt in prompts
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def cell(model: str, options: argparse.Namespace, runs: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """What is written: medians over pairs, and ratios of the two servers of a pair."""
    values = {arm: {name: [run[name] for run in found] for name in FIGURES} for arm, found in runs.items()}
    return {
        "model": model,
        "prompts": options.prompts,
        "users": options.users,
        "spread": options.spread,
        "requests": options.requests,
        "pairs": len(runs[VLLM]),
        "arms": {arm: {n: vars(median_interval(v)) for n, v in found.items()} for arm, found in values.items()},
        "ratio": {name: vars(ratio_interval(values[OURS][name], values[VLLM][name])) for name in FIGURES},
        "runs": dict(runs),
    }


def main() -> None:
    """Measure, print, write ``benchmarks/results/bench_serve.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    parser.set_defaults(model=SMOLLM2)
    parser.add_argument("--prompts", default="mixed", help="class of prompts")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--requests", type=int, default=12, help="requests of a run of the client")
    parser.add_argument("--tokens", type=int, default=48, help="mean of the largest lengths of answers")
    parser.add_argument("--spread", type=float, default=0.6, help="how much they differ, as a share of the mean")
    parser.add_argument("--name", default="", help="the conditions of this run, where they are not the usual ones")
    parser.add_argument("--output", type=Path, default=HERE / "results/bench_serve.json")
    options = parser.parse_args()
    model, console = chosen(options), Console()
    prompts = model.of_classes([options.prompts], options.pairs * options.requests, 21)[options.prompts]
    shared = ["--served-model-name", SERVED, "--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager"]
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as name:
        folder = Path(name)
        file = folder / "ours.toml"
        costs = json.dumps(str(folder / "costs"))
        file.write_text(f'[speculation]\ncosts_folder = {costs}\n[drafter]\nplugin = "suffix"\n')
        ours = [*shared, "--plugins", "vllm_instant", "--instant-config", str(file)]
        servers = {
            VLLM: Server(model.target, shared, log=folder / "vllm.log", name=VLLM),
            OURS: Server(model.target, ours, log=folder / "ours.log", name=OURS),
        }
        runs: dict[str, list[dict[str, float]]] = {VLLM: [], OURS: []}
        with running(*servers.values()):
            for pair in range(options.pairs):
                asked = folder / f"{pair}.jsonl"
                write_prompts(
                    asked, prompts[pair * options.requests :][: options.requests], options.tokens, options.spread
                )
                for arm in (VLLM, OURS) if pair % 2 == 0 else (OURS, VLLM):
                    result = folder / f"{pair}{arm}.json"
                    words = client_command(servers[arm], model, asked, result, options.users, options.requests)
                    runs[arm].append(ask(words, result))
                    console.print(pair, arm, {key: round(value, 1) for key, value in runs[arm][-1].items()})
                write(options.output, [cell(model.name, options, runs)], options.name, KEYS)


if __name__ == "__main__":
    main()
