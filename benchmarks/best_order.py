"""The best that any order of a burst can do, all lengths known: how much of what is wished for is there to be had.

    .venv/bin/python benchmarks/best_order.py

The bursts of ``benchmarks/scheduling.py``, 64 requests for 8 places, in a simulated engine: a prompt is read in a step
of its own, in which nobody gets a token; a step of decoding gives everybody a token. The three times are about those of
the demo's target on two cores: first come, first served is printed beside the live one (``scheduling.json``). Simulated
annealing looks for the order of starts with the least mean latency, under the bound on waiting (twice the wait first
come, first served, and a second) and without it. A search proves nothing, so look longer: ``--steps``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import HERE, write
from scheduling import TRAFFIC, WAIT_RATIO, WAIT_SECONDS

PLACES = 8
PROMPT_SECONDS = {"burst": 0.12, "chat burst": 0.05}
"""To read a prompt of the benchmark."""
STEP_SECONDS, ROW_SECONDS = 0.017, 0.001
"""Of a decoding step, and for each request in it."""


def run(order: Sequence[int], tokens: Sequence[int], prompt_seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds until each request's first token, and until its last, when they start in this order."""
    first, last = np.zeros(len(tokens)), np.zeros(len(tokens))
    now, running, waiting = 0.0, [], list(reversed(order))
    while running or waiting:
        while waiting and len(running) < PLACES:
            now += prompt_seconds
            request = waiting.pop()
            first[request] = now
            if tokens[request] > 1:
                running.append([tokens[request] - 1, request])
            else:
                last[request] = now
        if not running:
            continue
        steps = min(left for left, _ in running)
        now += steps * (STEP_SECONDS + ROW_SECONDS * len(running))
        for entry in running:
            entry[0] -= steps
            if not entry[0]:
                last[entry[1]] = now
        running = [entry for entry in running if entry[0]]
    return first, last


def search(tokens: Sequence[int], prompt_seconds: float, bound: np.ndarray, steps: int, seed: int) -> list[int]:
    """The order with the least mean latency that is found, nobody's first token being later than ``bound``."""
    random = np.random.default_rng(seed)
    order = list(range(len(tokens)))
    current = best = run(order, tokens, prompt_seconds)[1].mean()
    found = order
    for number in range(steps):
        new = order.copy()
        new.insert(int(random.integers(len(new))), new.pop(int(random.integers(len(new)))))
        first, last = run(new, tokens, prompt_seconds)
        warmth = 0.02 * best * (1 - number / steps) + 1e-9
        if (first > bound).any() or random.random() >= np.exp(min(0.0, current - last.mean()) / warmth):
            continue
        order, current = new, last.mean()
        if current < best:
            best, found = current, order
    return found


def measure(traffic: str, requests: int, bursts: int, steps: int) -> list[dict[str, Any]]:
    """Means over bursts: of the best orders, relative to first come, first served, and of that itself."""
    rows: dict[str, list[tuple[float, ...]]] = {"bound": [], "no bound": []}
    plain = []
    prompt_seconds = PROMPT_SECONDS[traffic]
    for seed in range(bursts):
        tokens = TRAFFIC[traffic][0].lengths(requests, np.random.default_rng(seed)).tolist()
        first, last = run(range(requests), tokens, prompt_seconds)
        plain.append((last.mean(), first.mean(), sum(tokens) / last.max()))
        limits = {
            "bound": WAIT_RATIO * (first - prompt_seconds) + WAIT_SECONDS + prompt_seconds,
            "no bound": np.full(requests, np.inf),
        }
        for name, limit in limits.items():
            begun, ended = run(search(tokens, prompt_seconds, limit, steps, seed), tokens, prompt_seconds)
            rows[name].append((ended.mean() / last.mean(), begun.mean() / first.mean()))
    latency, ttft, throughput = np.mean(plain, axis=0)
    cells = [
        {
            "traffic": traffic,
            "order": "first come, first served",
            "mean_latency_s": latency,
            "mean_ttft_s": ttft,
            "throughput": throughput,
        }
    ]
    for name, found in rows.items():
        latency, ttft = np.mean(found, axis=0)
        cells.append({"traffic": traffic, "order": f"best, {name}", "mean_latency": latency, "mean_ttft": ttft})
    return cells


def main() -> None:
    """Search, print and write ``benchmarks/results/best_order.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--bursts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--output", type=Path, default=HERE / "results/best_order.json")
    options = parser.parse_args()
    lived = json.loads((HERE / "results/scheduling.json").read_text())["measured"]
    cells = []
    for traffic in PROMPT_SECONDS:
        cells += measure(traffic, options.requests, options.bursts, options.steps)
        for live in (cell["arms"]["fcfs"] for cell in lived if cell["traffic"] == traffic):
            cells.append(
                {
                    "traffic": traffic,
                    "order": "first come, first served, live",
                    "mean_latency_s": live["mean_latency"]["median"],
                    "mean_ttft_s": live["mean_ttft"]["median"],
                    "throughput": live["throughput"]["median"],
                }
            )
    for cell in cells:
        print({name: round(float(value), 2) if isinstance(value, float) else value for name, value in cell.items()})
    write(options.output, cells)


if __name__ == "__main__":
    main()
