"""How large and long a rise must be to be found, and how often nothing is taken for one; simulated runs.

    .venv/bin/python benchmarks/spike_power.py [--runs 50]

Runs of 60 seconds with about ten answers under way. In some, every step takes so many times as long for so many
seconds; in the others nothing changes (at three rates, with and without drafts). The simulator is
``vllm_instant_loadtests.simulated``.
"""

from __future__ import annotations

import argparse
import itertools
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from results import HERE, write

from vllm_instant_loadtests import causes
from vllm_instant_loadtests.analysis import analyse_run
from vllm_instant_loadtests.run_recorder import Disturbance
from vllm_instant_loadtests.simulated import SERVER, SimulatedEngine, SimulatedTraffic, simulate_run

RATIOS, LENGTHS = (1.3, 1.6, 2.0, 3.0), (1.0, 2.0, 5.0, 10.0)
BEGIN = 30.0
TEN_STREAMS = SimulatedTraffic(rate=4.0)
FIRST_SEED = 10_000


def found(ratio: float, seconds: float, seed: int) -> bool:
    """Whether a spike overlaps the rise."""
    event = Disturbance(SERVER, causes.UNKNOWN, BEGIN, BEGIN + seconds)
    run = simulate_run(60.0, [event], slower=ratio, load=TEN_STREAMS, seed=seed)
    return any(spike.began < event.ended and spike.ended > event.began for spike in analyse_run(run).spikes)


def alarmed(seed: int) -> bool:
    """Whether a run without a change gets a spike."""
    load, engine = SimulatedTraffic(rate=(1.5, 2.5, 3.5)[seed % 3]), SimulatedEngine(draft_tokens=5 * (seed % 2))
    return bool(analyse_run(simulate_run(60.0, load=load, engine=engine, seed=seed)).spikes)


def main() -> None:
    """Simulate, print, write ``benchmarks/results/spike_power.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="of each cell; six times as many without a change")
    parser.add_argument("--output", type=Path, default=HERE / "results/spike_power.json")
    options = parser.parse_args()
    seeds = range(FIRST_SEED, FIRST_SEED + options.runs)
    cells = []
    with ProcessPoolExecutor() as pool:
        for seconds, ratio in itertools.product(LENGTHS, RATIOS):
            hits = sum(pool.map(found, *zip(*((ratio, seconds, seed) for seed in seeds), strict=True)))
            cells.append({"ratio": ratio, "seconds": seconds, "runs": options.runs, "found": hits})
            print(f"{ratio} times for {seconds:.0f} s: {hits} of {options.runs}")
        unchanged = 6 * options.runs
        alarms = sum(pool.map(alarmed, range(FIRST_SEED, FIRST_SEED + unchanged)))
    print(f"nothing changed: {alarms} of {unchanged}")
    write(options.output, {"rises": cells, "unchanged": {"runs": unchanged, "with_spikes": alarms}})


if __name__ == "__main__":
    main()
