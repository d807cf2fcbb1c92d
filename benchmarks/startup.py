"""What the package costs at start-up: stock vLLM and ours, alternating.

    .venv/bin/python benchmarks/startup.py [--rounds 6]

Two measurements. Whole servers: seconds from launch to health of a stock server (the package not even loaded,
VLLM_PLUGINS="") and of one with a deployment file and the speculation budget; both speculate with the same n-gram
drafter, so that they load the same parts of vLLM. Processes: seconds that our own code takes in the front end (flags,
deployment, checks of all patches) and in the engine core or a worker (activation).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from results import write

from vllm_instant.tools.demo import assets, widen_model
from vllm_instant.tools.measure.servers import Server
from vllm_instant.tools.measure.statistics import median_interval

DEPLOYMENT = '[drafter]\nplugin = "ngram"\nnum_speculative_tokens = 4\n'
STOCK_SPECULATION = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}'
COMMON = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"]

FRONT_END = """
import sys, time
import vllm.entrypoints.cli.serve as serve
from vllm.utils.argparse_utils import FlexibleArgumentParser
started = time.perf_counter()
from vllm_instant.register import register
register()
spent = time.perf_counter() - started
top = FlexibleArgumentParser(prog="vllm")
serve.ServeSubcommand().subparser_init(top.add_subparsers(dest="subparser"))
plain = time.perf_counter()
top.parse_args(["serve", "MODEL"])
plain = time.perf_counter() - plain
ours = time.perf_counter()
top.parse_args(["serve", "MODEL", "--plugins", "vllm_instant", "--instant-config", sys.argv[1]])
print(spent + time.perf_counter() - ours - plain)
"""

CHILD = """
import time
import vllm.v1.engine.core
started = time.perf_counter()
from vllm_instant.register import register
register()
print(time.perf_counter() - started)
"""


def process_seconds(code: str, file: Path, rounds: int, environment: dict[str, str]) -> list[float]:
    """What a process prints, ``rounds`` times; the first run fills the disk cache and does not count."""
    values = []
    for _ in range(rounds + 1):
        result = subprocess.run(
            [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True, env=environment
        )
        values.append(float(result.stdout.splitlines()[-1]))
    return values[1:]


def main() -> None:
    """Measure, print and write ``benchmarks/results/startup.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/startup.json")
    options = parser.parse_args()
    pair = assets.prepare(size=widen_model.SMALL, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "deploy.toml"
        file.write_text(DEPLOYMENT)
        plain = {**os.environ, "HF_HUB_OFFLINE": "1"}
        front_end = process_seconds(FRONT_END, file, options.rounds, plain)
        from vllm_instant.deployment.settings import resolve

        published = {**plain, "INSTANT_SETTINGS": resolve(file).model_dump_json()}
        child = process_seconds(CHILD, file, options.rounds, published)

        arms = {
            "stock": ([*COMMON, "--speculative-config", STOCK_SPECULATION], {"VLLM_PLUGINS": ""}),
            "vllm-instant": ([*COMMON, "--plugins", "vllm_instant", "--instant-config", str(file)], {}),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(options.rounds + 1):
            for name in list(arms) if number % 2 else list(arms)[::-1]:
                words, environment = arms[name]
                with Server(pair.target, words, log=Path(folder) / f"{name}.log", environment=environment) as server:
                    to_health = server.started_in or 0.0
                if number:  # the first round warms the disk cache
                    seconds[name].append(to_health)
                    print(f"{name}: healthy after {to_health:.1f} s", flush=True)
    difference = [ours - stock for ours, stock in zip(seconds["vllm-instant"], seconds["stock"], strict=True)]
    measured = {
        "front_end_seconds": vars(median_interval(front_end)),
        "engine_core_or_worker_seconds": vars(median_interval(child)),
        "stock_to_health_seconds": vars(median_interval(seconds["stock"])),
        "ours_to_health_seconds": vars(median_interval(seconds["vllm-instant"])),
        "difference_seconds": vars(median_interval(difference)),
    }
    print(json.dumps(measured, indent=2))
    write(options.output, measured)


if __name__ == "__main__":
    main()
