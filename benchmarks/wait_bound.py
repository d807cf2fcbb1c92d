"""What the bound on waiting costs: ``similarity`` with several bounds in a simulated server, against first come.

    .venv/bin/python benchmarks/wait_bound.py

A burst of 128 requests for 8 places, a fifth of the answers about 320 tokens long, the others about 16; 0.03 s a token.
Lengths are told by the clients or learned from 150 requests before. No engine: moments, and the same in every run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from results import write

from vllm_instant.tools.measure.queue_simulator import Job, serve
from vllm_instant_plugins.similarity import policy as similarity

SLOTS, SECONDS = 8, 0.03
BOUNDS = {"2x + 1 s": (2.0, 1.0), "4x + 1 s": (4.0, 1.0), "none": (1e9, 1e9)}


def stream(count: int, seed: int, told: bool, load: float | None = None) -> list[Job]:
    """A burst, or with ``load`` a Poisson stream at that share of what the places can serve."""
    random = np.random.default_rng(seed)
    is_long = random.random(count) < 0.2
    tokens = random.integers(np.where(is_long, 240, 8), np.where(is_long, 400, 24))
    if load is None:
        arrivals = np.sort(random.random(count) * 0.1)
    else:
        arrivals = np.cumsum(random.exponential(tokens.mean() * SECONDS / SLOTS / load, count))
    return [
        Job(
            float(at),
            int(n),
            prompt=[7 if slow else 3] * 32 + random.integers(10, 4000, 8).tolist(),
            hinted_tokens=int(n) if told else None,
        )
        for at, n, slow in zip(arrivals, tokens, is_long, strict=True)
    ]


def measure(bound: str, told: bool, seeds: int) -> dict[str, Any]:
    """Ratios to first come, first served, means over bursts."""
    # Without a bound there is nothing to keep for the slowest, either.
    similarity.MIN_TAIL_OBSERVATIONS = 100 if bound != "none" else 10**9
    taught = similarity.SimilarityPolicy(SLOTS, clock=lambda: 0.0)
    serve(stream(150, 99, told=False, load=0.7), SLOTS, taught, seconds_per_token=SECONDS)
    taught.close()
    rows = []
    for seed in range(seeds):
        policy = similarity.SimilarityPolicy(SLOTS, *BOUNDS[bound], clock=lambda: 0.0)
        policy.length_predictor.restore(taught.length_predictor.state())
        policy.service_time.coefficients[:] = taught.service_time.coefficients
        jobs = stream(128, seed, told)
        ours, theirs = (serve(jobs, SLOTS, p, seconds_per_token=SECONDS) for p in (policy, None))
        rows.append(
            (
                ours.latencies.mean() / theirs.latencies.mean(),
                ours.waits.mean() / theirs.waits.mean(),
                np.percentile(ours.latencies, 99) / np.percentile(theirs.latencies, 99),
                (ours.waits - 2 * theirs.waits - 1).max(),
            )
        )
    latency, wait, slowest, over = np.array(rows).T
    return {
        "bound": bound,
        "lengths": "told" if told else "learned",
        "bursts": seeds,
        "mean_latency": latency.mean(),
        "mean_wait": wait.mean(),
        "p99_latency": slowest.mean(),
        "max_seconds_over_2x_plus_1": over.max(),
    }


def main() -> None:
    """Simulate, print and write ``benchmarks/results/wait_bound.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bursts", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/wait_bound.json")
    options = parser.parse_args()
    cells = [measure(bound, told, options.bursts) for bound in BOUNDS for told in (True, False)]
    for cell in cells:
        print({name: round(value, 2) if isinstance(value, float) else value for name, value in cell.items()})
    write(options.output, cells)


if __name__ == "__main__":
    main()
