"""The ``similarity`` policy in a simulated server, against first come, first served: no engine, the same in every run.

    .venv/bin/python benchmarks/scheduling_simulated.py load|bound

``load``: Poisson arrivals at several shares of the capacity, with the chat traffic of ``scheduling.py``. Live servers
cannot show a difference near capacity: a machine that is some percent slower in one round has another queue under any
order. Here both orders serve the same requests in the same time.

``bound``: a burst of 128 requests, a fifth of the answers about 320 tokens long, the others about 16, under several
bounds on waiting. Clients tell the lengths, or the policy has learned them from 150 requests before.

8 requests run at a time; a decoding step takes 0.03 s.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import HERE, write
from scheduling_traffic import CHAT, Speed, requests_of

from vllm_instant.tools.measure.queue_simulator import Job, serve
from vllm_instant_plugins.similarity import policy as similarity
from vllm_instant_plugins.similarity.policy import SimilarityPolicy

SLOTS, SECONDS = 8, 0.03
LOADS = (0.7, 0.8, 0.9, 1.0, 1.1)
BOUNDS = {"2x + 1 s": (2.0, 1.0), "4x + 1 s": (4.0, 1.0), "none": (1e9, 1e9)}
LONG_TOKEN, SHORT_TOKEN = 7, 3
"""The first tokens of a prompt, which tell whether its answer is long."""


def prompt(is_long: bool, random: np.random.Generator) -> list[int]:
    """A system prompt that tells the kind of answer, and a question of its own."""
    return [LONG_TOKEN if is_long else SHORT_TOKEN] * 32 + random.integers(10, 4000, 8).tolist()


def chat(load: float, count: int, seed: int) -> list[Job]:
    """The chat traffic of ``scheduling.py`` at this share of the capacity."""
    random = np.random.default_rng(seed)
    return [
        Job(request.at, request.tokens, prompt=prompt(request.kind == "long", random))
        for request in requests_of(CHAT, load, count, Speed(SLOTS / SECONDS), seed)
    ]


def documents(count: int, seed: int, told: bool, load: float | None = None) -> list[Job]:
    """Long and short answers: a burst, or with ``load`` Poisson arrivals at that share of the capacity."""
    random = np.random.default_rng(seed)
    is_long = random.random(count) < 0.2
    tokens = random.integers(np.where(is_long, 240, 8), np.where(is_long, 400, 24))
    if load is None:
        arrivals = np.sort(random.random(count) * 0.1)
    else:
        arrivals = np.cumsum(random.exponential(tokens.mean() * SECONDS / SLOTS / load, count))
    return [
        Job(float(at), int(n), prompt=prompt(bool(slow), random), hinted_tokens=int(n) if told else None)
        for at, n, slow in zip(arrivals, tokens, is_long, strict=True)
    ]


def taught_by(jobs: Sequence[Job]) -> SimilarityPolicy:
    """A policy that has served these requests."""
    policy = SimilarityPolicy(SLOTS, clock=lambda: 0.0)
    serve(jobs, SLOTS, policy, seconds_per_token=SECONDS)
    policy.close()
    return policy


def compare(
    taught: SimilarityPolicy, streams: Sequence[Sequence[Job]], bound: Sequence[float] = ()
) -> Mapping[str, np.ndarray]:
    """Ratios to first come, first served by stream, and the waiting beyond twice its wait and a second."""
    rows = []
    for jobs in streams:
        policy = SimilarityPolicy(SLOTS, *bound, clock=lambda: 0.0)
        policy.length_predictor.restore(taught.length_predictor.state())
        policy.service_time.coefficients[:] = taught.service_time.coefficients
        ours, fcfs = (serve(jobs, SLOTS, p, seconds_per_token=SECONDS) for p in (policy, None))
        rows.append(
            {
                "mean_latency": ours.latencies.mean() / fcfs.latencies.mean(),
                "mean_wait": ours.waits.mean() / max(fcfs.waits.mean(), 1e-9),
                "p99_latency": np.percentile(ours.latencies, 99) / np.percentile(fcfs.latencies, 99),
                "over": (ours.waits - 2 * fcfs.waits - 1).max(),
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


RATIOS = ("mean_latency", "mean_wait", "p99_latency")


def by_load(load: float, count: int = 150, streams: int = 24) -> dict[str, Any]:
    """Mean and worst ratios over the streams at one load."""
    found = compare(taught_by(chat(1.1, 100, 99)), [chat(load, count, seed) for seed in range(streams)])
    return {
        "load": load,
        "requests": count,
        "streams": streams,
        **{name: float(found[name].mean()) for name in RATIOS},
        **{f"worst_{name}": float(found[name].max()) for name in RATIOS},
    }


def by_bound(bound: str, told: bool, bursts: int = 8) -> dict[str, Any]:
    """Mean ratios over the bursts with one bound on waiting."""
    # Without a bound the policy keeps nothing for the slowest requests either.
    similarity.MIN_TAIL_OBSERVATIONS = 100 if bound != "none" else 10**9
    taught = taught_by(documents(150, 99, told=False, load=0.7))
    found = compare(taught, [documents(128, seed, told) for seed in range(bursts)], BOUNDS[bound])
    return {
        "bound": bound,
        "lengths": "told" if told else "learned",
        "bursts": bursts,
        **{name: float(found[name].mean()) for name in RATIOS},
        "max_seconds_over_2x_plus_1": float(found["over"].max()),
    }


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "load": lambda: [by_load(load) for load in LOADS],
    "bound": lambda: [by_bound(bound, told) for bound in BOUNDS for told in (True, False)],
}


def main() -> None:
    """Simulate, print, write ``benchmarks/results/scheduling_simulated.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--output", type=Path, default=HERE / "results/scheduling_simulated.json")
    options = parser.parse_args()
    cells = PARTS[options.part]()
    for cell in cells:
        print({name: round(value, 3) if isinstance(value, float) else value for name, value in cell.items()})
    write(options.output, cells, options.part)


if __name__ == "__main__":
    main()
