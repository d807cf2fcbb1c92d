"""What servers need and offer at start-up: seconds to health, and the KV cache's capacity.

    .venv/bin/python benchmarks/startup.py seconds [--rounds 6]
    .venv/bin/python benchmarks/startup.py capacity

``seconds``: whole servers from launch to health, a stock server (the package not even loaded, VLLM_PLUGINS="") and one
with a deployment file and draft budgets, alternating; both speculate with the same n-gram drafter, so that they load
the same parts of vLLM. And by process: seconds that our own code takes in the front end (flags, deployment, checks of
all patches) and in the engine core or a worker (activation).

``capacity``: how many requests fit into 1 GiB of KV cache, by vLLM's own start-up figure, in BF16, FP8 and
``fp8_fused``, with a model of random weights (head size 128, 8 KV heads) on the CPU. ``fp8_fused`` starts in Triton's
interpreter; no request is sent.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import HERE, write

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

HEAD, KV_HEADS, LAYERS, MAX_MODEL_LEN = 128, 8, 4, 2048
MODEL = {
    "head_dim": HEAD,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": MAX_MODEL_LEN,
}
ARGUMENTS = ["--dtype", "bfloat16", "--load-format", "dummy", "--max-num-seqs", "4", "--enforce-eager"]


def process_seconds(code: str, file: Path, rounds: int, environment: dict[str, str]) -> list[float]:
    """The figure that a process prints, ``rounds`` times after a first run that fills the disk cache."""
    values = []
    for _ in range(rounds + 1):
        result = subprocess.run(
            [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True, env=environment
        )
        values.append(float(result.stdout.splitlines()[-1]))
    return values[1:]


def model(folder: Path) -> Path:
    """A model without weights, with the demo's tokenizer."""
    base = assets.ASSETS / assets.BASE_IN_ASSETS
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(base / name, folder / name)
    config = json.loads((base / "config.json").read_text()) | MODEL
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def figures(server: Server) -> dict[str, Any]:
    """The KV cache's size and concurrency in vLLM's start-up log."""
    log = server.log_text()
    tokens = re.search(r"KV cache size: ([\d,]+) tokens", log)
    concurrency = re.search(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", log)
    if tokens is None or concurrency is None:
        raise SystemExit(f"the log of {server.command} does not name the KV cache's size:\n{server.log_tail()}")
    return {"tokens": int(tokens[1].replace(",", "")), "concurrency": float(concurrency[1])}


def seconds(rounds: int) -> dict[str, Any]:
    """Seconds to health of whole servers, and of our own code by process."""
    pair = assets.prepare(size=widen_model.SMALL, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "deploy.toml"
        file.write_text(DEPLOYMENT)
        plain = {**os.environ, "HF_HUB_OFFLINE": "1"}
        front_end = process_seconds(FRONT_END, file, rounds, plain)
        from vllm_instant.deployment.settings import resolve

        published = {**plain, "INSTANT_SETTINGS": resolve(file).model_dump_json()}
        child = process_seconds(CHILD, file, rounds, published)

        arms = {
            "stock": ([*COMMON, "--speculative-config", STOCK_SPECULATION], {"VLLM_PLUGINS": ""}),
            "vllm-instant": ([*COMMON, "--plugins", "vllm_instant", "--instant-config", str(file)], {}),
        }
        to_health: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(rounds + 1):
            for name in list(arms) if number % 2 else list(arms)[::-1]:
                words, environment = arms[name]
                with Server(pair.target, words, log=Path(folder) / f"{name}.log", environment=environment) as server:
                    healthy_after = server.started_in or 0.0
                if number:  # the first round warms the disk cache
                    to_health[name].append(healthy_after)
                    print(f"{name}: healthy after {healthy_after:.1f} s", flush=True)
    difference = [ours - stock for ours, stock in zip(to_health["vllm-instant"], to_health["stock"], strict=True)]
    measured: dict[str, Any] = {
        "front_end_seconds": vars(median_interval(front_end)),
        "engine_core_or_worker_seconds": vars(median_interval(child)),
        "stock_to_health_seconds": vars(median_interval(to_health["stock"])),
        "ours_to_health_seconds": vars(median_interval(to_health["vllm-instant"])),
        "difference_seconds": vars(median_interval(difference)),
    }
    print(json.dumps(measured, indent=2))
    return measured


def capacity() -> dict[str, Any]:
    """Tokens and requests that fit into the cache, by format."""
    rows: list[dict[str, Any]] = []
    ours = ["--plugins", "vllm_instant", "--instant-set", "attention.plugin=fp8_fused"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = model(Path(temporary))
        for name, words, environment in (
            ("BF16 (stock)", [], {}),
            ("FP8, one scale for all (stock)", ["--kv-cache-dtype", "fp8"], {}),
            ("fp8_fused", ours, {"TRITON_INTERPRET": "1"}),
        ):
            log = folder / f"{len(rows)}.log"
            with Server(folder, [*ARGUMENTS, *words], log=log, environment=environment) as server:
                rows.append({"cache": name} | figures(server))
    for row in rows:
        row["times_bf16"] = row["tokens"] / rows[0]["tokens"]
        row["bytes_of_bf16"] = rows[0]["tokens"] / row["tokens"]
        print(
            f"{row['cache']:32} {row['tokens']:>8,} tokens, {row['concurrency']:>6.2f} requests of "
            f"{MAX_MODEL_LEN:,} tokens, {row['times_bf16']:.2f} times BF16, {row['bytes_of_bf16']:.3f} times its bytes "
            "per token"
        )
    shape = {"head": HEAD, "kv_heads": KV_HEADS, "layers": LAYERS, "max_model_len": MAX_MODEL_LEN, "cache_gib": 1}
    return {**shape, "rows": rows}


def main() -> None:
    """Measure one part, print, write ``benchmarks/results/startup.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("seconds", "capacity"))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=HERE / "results/startup.json")
    options = parser.parse_args()
    write(options.output, seconds(options.rounds) if options.part == "seconds" else capacity(), options.part)


if __name__ == "__main__":
    main()
