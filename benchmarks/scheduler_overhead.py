"""What the speculation budget costs in the scheduler: ours beside stock, step by step, in one process.

    .venv/bin/python benchmarks/scheduler_overhead.py [--running 256] [--drafts 4] [--rounds 40]

Rounds of the two schedulers alternate. A step is everything that the engine core does between two model executions:
schedule, update_from_output, update_draft_token_ids (the last not with asynchronous scheduling). Requests decode only.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import scheduler_harness as harness
from results import write
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches.scheduler import create_scheduler
from vllm_instant.tools.demo import assets, widen_model
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval

STEPS_A_ROUND = 20
TOKENS_BEFORE_RESTART = 400


class Arm:
    """One scheduler with requests that decode; started afresh before its requests grow out of the model's length."""

    def __init__(self, factory: Any, config: Any, running: int, drafts: int, asynchronous: bool) -> None:
        self.factory, self.config, self.running = factory, config, running
        self.drafts, self.asynchronous = drafts, asynchronous
        self.serial = 0
        self._restart()

    def _restart(self) -> None:
        self.scheduler = harness.make_scheduler(self.factory, self.config)
        for _ in range(self.running):
            self.serial += 1
            self.scheduler.add_request(harness.make_request(self.serial, max_tokens=900))
        self.produced = 0
        while (
            any(request.is_prefill_chunk or not request.output_token_ids for request in self.scheduler.running)
            or len(self.scheduler.running) < self.running
        ):
            self._step()

    def _step(self) -> float:
        scheduler = self.scheduler
        started = time.perf_counter()
        output = scheduler.schedule()
        scheduled = time.perf_counter() - started
        accepted = dict.fromkeys(output.scheduled_spec_decode_tokens, 1)
        reported = harness.answer(output, accepted)
        drafts = harness.drafts_for(output, self.drafts)
        started = time.perf_counter()
        scheduler.update_from_output(output, reported)
        if not self.asynchronous:
            scheduler.update_draft_token_ids(drafts)
        self.produced += 2
        return scheduled + time.perf_counter() - started

    def round(self) -> float:
        """Mean seconds of a step over one round."""
        if self.produced > TOKENS_BEFORE_RESTART:
            self._restart()
        return sum(self._step() for _ in range(STEPS_A_ROUND)) / STEPS_A_ROUND


def measure(running: int, drafts: int, rounds: int, asynchronous: bool) -> dict[str, Any]:
    """Alternate both arms and return medians with intervals, in microseconds a step."""
    pair = assets.prepare(size=widen_model.SMALL, dtype="float32")
    config = harness.engine_config(pair.target, drafts, running, asynchronous)
    # The mechanism alone; a policy that thinks longer does so while the model runs (policy_overhead.py).
    deployment_env.set_deployment(resolve(None, ["speculation.plugin=fixed", f"speculation.num_draft_tokens={drafts}"]))
    arms = {
        "stock": Arm(AsyncScheduler if asynchronous else Scheduler, config, running, drafts, asynchronous),
        "vllm-instant": Arm(create_scheduler, config, running, drafts, asynchronous),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm.round()
    for number in range(rounds):
        for name in list(arms) if number % 2 else list(arms)[::-1]:
            times[name].append(arms[name].round() * 1e6)
    difference = [a - b for a, b in zip(times["vllm-instant"], times["stock"], strict=True)]
    return {
        "scheduling": "asynchronous" if asynchronous else "synchronous",
        "running": running,
        "drafts": drafts,
        "stock_us": vars(median_interval(times["stock"])),
        "ours_us": vars(median_interval(times["vllm-instant"])),
        "overhead_us": vars(median_interval(difference)),
        "ratio": vars(ratio_interval(times["vllm-instant"], times["stock"])),
    }


def main() -> None:
    """Measure, print and write ``benchmarks/results/scheduler_overhead.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/scheduler_overhead.json")
    options = parser.parse_args()
    measured = [measure(options.running, options.drafts, options.rounds, mode) for mode in (False, True)]
    for row in measured:
        ours, stock, overhead = row["ours_us"], row["stock_us"], row["overhead_us"]
        print(
            f"{row['scheduling']}, {row['running']} running, {row['drafts']} drafts: stock {stock['median']:.0f} µs, "
            f"ours {ours['median']:.0f} µs, overhead {overhead['median']:.0f} µs "
            f"[{overhead['low']:.0f}, {overhead['high']:.0f}] a step"
        )
    write(options.output, measured)


if __name__ == "__main__":
    main()
