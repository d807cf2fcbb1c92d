"""What one message a step to the workers is worth on a CPU (``vllm_instant/patches/cpu/single_rpc.py``).

.venv/bin/python benchmarks/worker_messages.py

One server, whose worker answers in turn as vLLM has it (a message each for the model, the sampling and the drafts) and
all at once. Clients pin the draft length, so that nothing else differs: to none, and to 2 random tokens. Short turns
alternate; the ratio is that of tokens a second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from regret_setup import HERE, MAX_TOKENS, MODEL
from results import write

from vllm_instant.tools.demo import assets
from vllm_instant.tools.measure.closed_loop import run_closed_loop
from vllm_instant.tools.measure.prompts import snippets
from vllm_instant.tools.measure.servers import Server, settle
from vllm_instant.tools.measure.statistics import Interval, median_interval, ratio_interval

DRAFTS = 2
ARMS = {"as vLLM": False, "at once": True}


def main() -> None:
    """Measure, print and write ``benchmarks/results/worker_messages.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=HERE / "results/worker_messages.json")
    options = parser.parse_args()
    prompts = snippets("code", 0.0, 256, 3)
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="messages-") as name:
        control = Path(name) / "control.json"
        control.write_text("{}")
        speculative = {
            "method": "custom_class",
            "model": "switchable_messages.SwitchableMessages",
            "num_speculative_tokens": DRAFTS,
        }
        server = Server(
            assets.prepare().target,
            [
                *("--served-model-name", MODEL, "--max-model-len", "1024", "--max-num-seqs", "32"),
                *("--block-size", "32", "--enforce-eager", "--no-enable-prefix-caching"),
                *("-sc", json.dumps(speculative), "--plugins", "vllm_instant"),
                *("--instant-set", "speculation.plugin=fixed"),
            ],
            log=Path(name) / "server.log",
            environment={
                "SWITCHABLE_DRAFTER": str(control),
                "PYTHONPATH": str(HERE),
                "VLLM_CPU_KVCACHE_SPACE": "1",
            },
        )
        with server:
            for users, drafts in itertools.product((int(load) for load in options.loads.split(",")), (0, DRAFTS)):
                speeds: dict[str, list[float]] = {arm: [] for arm in ARMS}
                for number in range(-1, options.rounds):
                    for arm in list(ARMS) if number % 2 else list(ARMS)[::-1]:
                        partial = control.with_suffix(".part")
                        partial.write_text(json.dumps({"mode": "hopeless", "at_once": ARMS[arm]}))
                        partial.replace(control)
                        settle()
                        turn = run_closed_loop(
                            server.url,
                            MODEL,
                            prompts,
                            concurrency=users,
                            seconds=options.seconds,
                            max_tokens=MAX_TOKENS,
                            first_prompt=(number + 1) * 4 * users,
                            extra={"vllm_xargs": {"instant_speculation": drafts or "off"}},
                        )
                        if turn.errors:
                            raise SystemExit(turn.errors[0])
                        if number >= 0:
                            speeds[arm].append(turn.tokens_per_second)
                ratio = ratio_interval(speeds["at once"], speeds["as vLLM"])
                measured.append(
                    {
                        "users": users,
                        "draft_tokens": drafts,
                        "tokens_per_second": {arm: vars(median_interval(found)) for arm, found in speeds.items()},
                        "at_once_to_vllm": vars(ratio),
                    }
                )
                print(
                    f"{users} users, {drafts} drafts: at once is {Interval(**vars(ratio)):.3f} times as fast",
                    flush=True,
                )
    write(options.output, measured)


if __name__ == "__main__":
    main()
