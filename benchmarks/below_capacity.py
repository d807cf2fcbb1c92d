"""Is anybody worse off for the ``similarity`` queue when there is hardly any queue? In a simulated server.

    .venv/bin/python benchmarks/below_capacity.py

The short questions of ``scheduling.py`` (a fifth of the answers about 600 tokens long, the others 8), 8 places, 0.03 s
a token, Poisson arrivals at several shares of what the places can serve; lengths learned from 100 requests before. Live
servers cannot tell near capacity: a machine that is some percent slower in one turn has another queue, whoever orders
it. Here both orders serve the same requests in the same time, and every run gives the same numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from results import write
from scheduling import CHAT, wishes

from vllm_instant.tools.measure.queue_simulator import Job, serve
from vllm_instant_plugins.similarity.policy import SimilarityPolicy

SLOTS, SECONDS = 8, 0.03
LOADS = (0.7, 0.8, 0.9, 1.0, 1.1)


def stream(load: float, count: int, seed: int) -> list[Job]:
    """Requests at this share of what the places can serve; the first tokens say what kind of answer is wanted."""
    random = np.random.default_rng(seed)
    return [
        Job(wish.at, wish.tokens, prompt=[7 if wish.kind == "long" else 3] * 32 + random.integers(10, 4000, 8).tolist())
        for wish in wishes(CHAT, load, count, SLOTS / SECONDS, seed)
    ]


def measure(load: float, count: int, seeds: int) -> dict[str, Any]:
    """Ratios to first come, first served over ``seeds`` streams of ``count`` requests: means, and the worst."""
    taught = SimilarityPolicy(SLOTS, clock=lambda: 0.0)
    serve(stream(1.1, 100, 99), SLOTS, taught, seconds_per_token=SECONDS)
    taught.close()
    rows = []
    for seed in range(seeds):
        policy = SimilarityPolicy(SLOTS, clock=lambda: 0.0)
        policy.length_predictor.restore(taught.length_predictor.state())
        policy.service_time.coefficients[:] = taught.service_time.coefficients
        jobs = stream(load, count, seed)
        ours, theirs = (serve(jobs, SLOTS, p, seconds_per_token=SECONDS) for p in (policy, None))
        rows.append(
            {
                "mean_latency": ours.latencies.mean() / theirs.latencies.mean(),
                "mean_wait": ours.waits.mean() / max(theirs.waits.mean(), 1e-9),
                "p99_latency": np.percentile(ours.latencies, 99) / np.percentile(theirs.latencies, 99),
            }
        )
    of = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {
        "load": load,
        "requests": count,
        "streams": seeds,
        **{name: float(values.mean()) for name, values in of.items()},
        **{f"worst_{name}": float(values.max()) for name, values in of.items()},
    }


def main() -> None:
    """Simulate, print and write ``benchmarks/results/below_capacity.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/below_capacity.json")
    options = parser.parse_args()
    cells = [measure(load, options.requests, options.streams) for load in LOADS]
    for cell in cells:
        print({name: round(value, 3) if isinstance(value, float) else value for name, value in cell.items()})
    write(options.output, cells)


if __name__ == "__main__":
    main()
