"""Whole servers on a GPU: vLLM without drafts, with each fixed draft length, with adaptive verification, and ours.

    python benchmarks/gpu/servers.py --model Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B

One server has the device at a time. Each arm is started ``--starts`` times, in a new order each time, since servers of
one kind differ, and each start gets all loads. What an arm cannot do is recorded with vLLM's own last words. Prompts
are those of ``vllm_instant.tools.demo.prompt_sets`` in the model's own chat template: edits of functions, facts to
extract, stories at temperature 0.8, in equal shares.

``--any-device`` also runs where there is no GPU, for instance to try the script with the demo's models on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from results import write  # noqa: E402  a module of the folder above

from vllm_instant.tools.demo.prompt_sets import PROMPT_SETS  # noqa: E402
from vllm_instant.tools.measure.closed_loop import PromptSpec, run_closed_loop  # noqa: E402
from vllm_instant.tools.measure.servers import Server, ServerError, terminable  # noqa: E402
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval  # noqa: E402

OFF, OURS, OURS_DEFAULT = "off", "ours", "ours without a file"
CLASSES = ("edit", "extract", "story")
MAX_TOKENS = (128, 384)


@dataclass
class Windows:
    """What one arm showed at one load, a value per window."""

    tokens_per_second: list[float] = field(default_factory=list)
    itl_p50_ms: list[float] = field(default_factory=list)
    itl_p99_ms: list[float] = field(default_factory=list)
    ttft_p50_ms: list[float] = field(default_factory=list)


def arms_of(options: argparse.Namespace) -> dict[str, list[str]]:
    """Further words of each arm's command line."""
    lookup = {"method": "ngram", "prompt_lookup_max": 4, "num_speculative_tokens": 4}
    arms = {OFF: [], "ngram, K=4": ["-sc", json.dumps(lookup)], OURS_DEFAULT: ["--plugins", "vllm_instant"]}
    if options.draft:
        model = {"method": "draft_model", "model": options.draft}
        longest = max(options.lengths)
        for length in options.lengths:
            arms[f"draft model, K={length}"] = ["-sc", json.dumps(model | {"num_speculative_tokens": length})]
        adaptive = model | {"num_speculative_tokens": longest, "enable_adaptive_verification": True}
        arms["adaptive verification"] = ["-sc", json.dumps(adaptive)]
        ours = ["-sc", json.dumps(model | {"num_speculative_tokens": longest})]
        arms[OURS] = ["--plugins", "vllm_instant", *ours]
        arms[f"{OURS}, adaptive verification"] = ["--plugins", "vllm_instant", *arms["adaptive verification"]]
    return arms


def prompts_for(model: str, count: int) -> list[PromptSpec]:
    """Messages of all classes in turn, in the model's chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for name in CLASSES:
        kind = PROMPT_SETS[name]
        texts = kind.texts(random.Random(f"{name}/gpu"))
        for _, text in zip(range(count), texts, strict=False):
            turns = [{"role": "user", "content": text}]
            if tokenizer.chat_template:
                text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            found.append(PromptSpec(text, kind.temperature, name))
    random.Random(0).shuffle(found)
    return found


def measure(
    server: Server, prompts: Sequence[PromptSpec], options: argparse.Namespace, into: dict[int, Windows]
) -> None:
    """All windows of one start; the first window of a load warms the server up for it and does not count."""
    for load in options.loads:
        for number in range(options.windows + 1):
            turn = run_closed_loop(
                server.url,
                server.served_model(),
                prompts,
                concurrency=load,
                seconds=options.seconds,
                max_tokens=MAX_TOKENS,
                first_prompt=number * 4 * load,
            )
            if turn.errors:
                raise SystemExit(f"{server.name}, {load} users: {turn.errors[0]}")
            gaps = turn.inter_token_latencies() * 1e3
            if number and len(gaps) and turn.ttft:
                windows = into.setdefault(load, Windows())
                windows.tokens_per_second.append(turn.tokens_per_second)
                windows.itl_p50_ms.append(float(np.percentile(gaps, 50)))
                windows.itl_p99_ms.append(float(np.percentile(gaps, 99)))
                windows.ttft_p50_ms.append(1e3 * float(np.median(turn.ttft)))


def cells(found: dict[str, dict[int, Windows]], loads: Sequence[int]) -> list[dict[str, Any]]:
    """A row per load: every arm's figures, and ours relative to the best of vLLM's own arms."""
    rows = []
    for load in loads:
        windows = {arm: of[load] for arm, of in found.items() if load in of}
        row: dict[str, Any] = {"users": load, "arms": {arm: vars(of) for arm, of in windows.items()}}
        stock = [arm for arm in windows if not arm.startswith(OURS)]
        if stock:
            best = max(stock, key=lambda arm: np.median(windows[arm].tokens_per_second))
            row["best_vllm_arm"] = best
            for arm in windows.keys() - set(stock):
                ours, theirs = windows[arm].tokens_per_second, windows[best].tokens_per_second
                shortest = min(len(ours), len(theirs))
                row[f"{arm} / best"] = vars(ratio_interval(ours[:shortest], theirs[:shortest]))
        rows.append(row)
        shown = ", ".join(f"{arm} {median_interval(of.tokens_per_second):.0f}" for arm, of in windows.items())
        print(f"{load} users: {shown} tokens/s; best of vLLM's arms: {row.get('best_vllm_arm', 'none')}", flush=True)
    return rows


def numbers(text: str) -> list[int]:
    """Numbers that are separated by commas."""
    return [int(number) for number in text.split(",")]


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write ``benchmarks/results/gpu_servers.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", default=None, help="a draft model with the same vocabulary")
    parser.add_argument("--loads", type=numbers, default=numbers("1,4,16,64,256"), help="users at a time")
    parser.add_argument("--lengths", type=numbers, default=numbers("1,2,4,8"), help="fixed draft lengths")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--windows", type=int, default=3, help="per start and load")
    parser.add_argument("--seconds", type=float, default=10.0, help="per window")
    parser.add_argument("--any-device", action="store_true")
    parser.add_argument("--output", type=Path, default=HERE.parent / "results/gpu_servers.json")
    parser.add_argument("serve", nargs="*", help="further words of vllm serve, after --")
    options = parser.parse_args(words)
    if not options.any_device:
        from timing import can_run

        if not can_run():
            return 2
    prompts, arms = prompts_for(options.model, 64), arms_of(options)
    found: dict[str, dict[int, Windows]] = {arm: {} for arm in arms}
    refused: dict[str, str] = {}
    with terminable(), tempfile.TemporaryDirectory(prefix="gpu-servers-") as folder:
        for start in range(options.starts):
            for arm in random.Random(start).sample(list(arms), len(arms)):
                if arm in refused:
                    continue
                server = Server(
                    options.model, [*options.serve, *arms[arm]], log=Path(folder) / f"{start}-{arm}.log", name=arm
                )
                print(f"start {start + 1} of {options.starts}: {arm}", flush=True)
                try:
                    with server:
                        measure(server, prompts, options, found[arm])
                except ServerError:
                    refused[arm] = server.log_tail(1).strip()
    rows = cells(found, options.loads)
    name = f"{options.model}, drafts by {options.draft or 'lookup'}"
    write(options.output, [row | {"refused": refused} for row in rows], name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
