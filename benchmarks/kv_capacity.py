"""How many requests fit into the same KV-cache memory, by vLLM's own start-up figure: BF16, FP8 and ours.

    .venv/bin/python benchmarks/kv_capacity.py

Starts servers on the CPU with a made-up model (random weights, head size 128, 8 KV heads) in BF16 and 1 GiB of cache,
and reads "KV cache size" and "Maximum concurrency" from their logs. `fp8_fused` starts in Triton's interpreter; nothing
is asked of any of them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from results import write

from vllm_instant.tools.measure.servers import Server

BASE = Path(__file__).resolve().parent.parent / "vllm_instant/tools/demo/assets/base"
HEAD, KV_HEADS, LAYERS, LONGEST = 128, 8, 4, 2048
MODEL = {
    "head_dim": HEAD,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": LONGEST,
}
ARGUMENTS = ["--dtype", "bfloat16", "--load-format", "dummy", "--max-num-seqs", "4", "--enforce-eager"]


def model(folder: Path) -> Path:
    """A model without weights, with the demo's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BASE / name, folder / name)
    config = json.loads((BASE / "config.json").read_text()) | MODEL
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def figures(server: Server) -> dict[str, Any]:
    """What vLLM's start-up says."""
    log = server.log_text()
    tokens = re.search(r"KV cache size: ([\d,]+) tokens", log)
    concurrency = re.search(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", log)
    if tokens is None or concurrency is None:
        raise SystemExit(f"the log of {server.command} says nothing of the KV cache's size:\n{server.log_tail()}")
    return {"tokens": int(tokens[1].replace(",", "")), "concurrency": float(concurrency[1])}


def main() -> None:
    """Start, read, print, write ``benchmarks/results/kv_capacity.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/kv_capacity.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = model(Path(temporary))
        ours = ["--plugins", "vllm_instant", "--instant-set", "attention.plugin=fp8_fused"]
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
            f"{row['cache']:32} {row['tokens']:>8,} tokens, {row['concurrency']:>6.2f} requests of {LONGEST:,} tokens, "
            f"{row['times_bf16']:.2f} times BF16, {row['bytes_of_bf16']:.3f} times its bytes a token"
        )
    measured = {"head": HEAD, "kv_heads": KV_HEADS, "layers": LAYERS, "longest": LONGEST, "cache_gib": 1, "rows": rows}
    write(arguments.output, measured)


if __name__ == "__main__":
    main()
