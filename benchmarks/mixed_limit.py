"""How much choosing by request could bring at most on mixed traffic, with the demo's draft model on this machine.

.venv/bin/python benchmarks/mixed_limit.py

Half of the requests are structured at temperature 0, half open-ended at temperature 1, as in ``regret.py``. All arms
are one and the same server of ours whose clients pin their draft lengths: every pair (length for structured requests,
length for open-ended ones). Pairs of equal lengths are fixed draft lengths. A policy that knew the class of each
request, its acceptance and all costs from the start could choose the best pair: how far that is above the best fixed
length is what any choice by class can gain here.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from regret_setup import MAX_TOKENS, MODEL, OURS, Servers, mixed
from results import earlier, merged, write
from rich.console import Console

from vllm_instant.tools.measure.closed_loop import PromptSpec, run_closed_loop
from vllm_instant.tools.measure.servers import running, settle
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval

LENGTHS = (0, 1, 2, 4)
DROPPED_BELOW = 0.85
"""Pairs that are further behind than this after the first round get no further turns."""

PairOfLengths = tuple[int, int]


def pinned(prompts: Sequence[PromptSpec], pair: PairOfLengths) -> list[PromptSpec]:
    """The prompts with the length of their class asked for."""
    lengths = {"structured": pair[0], "free": pair[1]}
    return [replace(p, extra={"vllm_xargs": {"instant_speculation": lengths[p.kind] or "off"}}) for p in prompts]


def one_load(server: str, users: int, rounds: int, seconds: float) -> dict[str, Any]:
    """All pairs with this many users."""
    prompts = mixed(512, 9)
    pairs = list(itertools.product(LENGTHS, LENGTHS))
    order = random.Random(users)
    speeds: dict[PairOfLengths, list[float]] = {}
    policy: list[float] = []
    for number in range(-1, rounds):
        order.shuffle(pairs)
        # The policy itself learns in a turn that does not count.
        for pair in [*pairs, None] if number >= 0 else [None]:
            settle()
            turn = run_closed_loop(
                server,
                MODEL,
                pinned(prompts, pair) if pair is not None else prompts,
                concurrency=users,
                seconds=seconds,
                max_tokens=MAX_TOKENS,
                first_prompt=(number + 1) * 4 * users,
            )
            if turn.errors:
                raise SystemExit(turn.errors[0])
            if number >= 0:
                (policy if pair is None else speeds.setdefault(pair, [])).append(turn.tokens_per_second)
        if number == 0:
            least = DROPPED_BELOW * max(speeds[pair][0] for pair in pairs)
            pairs = [pair for pair in pairs if speeds[pair][0] >= least or pair == (0, 0)]
    complete = [pair for pair in pairs if len(speeds[pair]) == rounds]

    def median(pair: PairOfLengths) -> float:
        return float(np.median(speeds[pair]))

    best = max(complete, key=median)
    fixed = max((pair for pair in complete if pair[0] == pair[1]), key=median)
    return {
        "users": users,
        "best_pair": best,
        "best_fixed": fixed[0],
        "best_pair_to_best_fixed": vars(ratio_interval(speeds[best], speeds[fixed])),
        "best_fixed_to_off": vars(ratio_interval(speeds[fixed], speeds[0, 0])),
        "policy_to_best_fixed": vars(ratio_interval(policy, speeds[fixed])),
        "tokens_per_second": {f"{a},{b}": vars(median_interval(found)) for (a, b), found in sorted(speeds.items())},
        "policy_tokens_per_second": vars(median_interval(policy)),
    }


def main() -> None:
    """Measure, print, write ``benchmarks/results/mixed_limit.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", default="4,8,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/mixed_limit.json")
    parser.add_argument("--append", action="store_true", help="keep what the output file has of other loads")
    options = parser.parse_args()
    kept = earlier(options.output) if options.append else []
    console = Console()
    measured = []
    with tempfile.TemporaryDirectory(prefix="mixed-") as name:
        servers = Servers("pair", (), Path(name))
        server = servers.arms[OURS]
        with running(server):
            for users in (int(load) for load in options.loads.split(",")):
                found = one_load(server.url, users, options.rounds, options.seconds)
                measured.append(found)
                ratio = found["best_pair_to_best_fixed"]
                console.print(
                    f"{users} users: best pair {found['best_pair']} is {ratio['median']:.3f} "
                    f"[{ratio['low']:.3f}, {ratio['high']:.3f}] times the best fixed length (K={found['best_fixed']}); "
                    f"the policy {found['policy_to_best_fixed']['median']:.3f}",
                    soft_wrap=True,
                )
                write(options.output, merged(kept, measured, "users"))


if __name__ == "__main__":
    main()
