"""What the ``similarity`` queue costs in the scheduler: ours beside stock, step by step, in one process.

    .venv/bin/python benchmarks/queue_overhead.py [--running 256] [--waiting 1000] [--rounds 30]

Rounds of the two schedulers alternate. A step is everything that the engine core does between two model executions:
taking in the requests that came (as many as ended, so that as many wait all the time), ``schedule`` and
``update_from_output``. What the policy does while the model runs (``get_grammar_bitmask``) is timed by itself.

A model run leaves none of the scheduler's memory in the caches of a core, whoever schedules. ``between: model`` stands
for it: both schedulers find their caches emptied after ``schedule``, by a walk through more memory than they hold.
``between: nothing`` leaves them as they are, so that stock finds everything where it was and ours what its thinking
left of it, which happens in no server; the truth of one whose model runs on another device lies between.

``hidden``: answers end at a length that nothing foretells. ``foretold``: the length is the request's ``max_tokens``,
which the policy learns to use, so that requests start in another order than they came. How many end in a step is
reported, since each costs vLLM its time.

Three steps before each round are not timed: the caches held the other scheduler, and the clock that patience is told by
went on without this one. Python's garbage collector runs between rounds and not within: a collection takes as long as
half a step, and whose allocation crosses its threshold is chance. ``--collector`` leaves it on.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import scheduler_harness as harness
from results import write
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches.scheduler import create_scheduler
from vllm_instant.tools.demo import assets, widen_model
from vllm_instant.tools.measure.statistics import median_interval, ratio_interval

STEPS_A_ROUND = 25
UNTIMED_STEPS = 3
LENGTHS = (20, 300)
WALK = np.ones(1 << 23)
"""64 MiB: more than the cores' caches hold."""


class Arm:
    """One scheduler with a full batch and a queue."""

    def __init__(self, factory: Any, config: Any, running: int, waiting: int, foretold: bool, model: bool) -> None:
        self._foretold, self._lengths, self._model = foretold, dict[str, int](), model
        self.scheduler = harness.make_scheduler(factory, config)
        self.present, self.number, self.beside = running + waiting, 0, 0.0
        self.ended_a_step: list[float] = []
        self._random = random.Random(0)
        self._fill()
        # Until the first generation has ended, all began together.
        for _ in range(LENGTHS[1]):
            self._step()

    def _fill(self) -> None:
        while len(self.scheduler.requests) < self.present:
            self.number += 1
            tokens = self._random.randrange(*LENGTHS)
            most = tokens if self._foretold else LENGTHS[1]
            request = harness.make_request(self.number, prompt_tokens=48, max_tokens=most)
            self._lengths[request.request_id] = tokens
            self.scheduler.add_request(request)

    def _step(self) -> float:
        scheduler = self.scheduler
        started = time.perf_counter()
        self._fill()
        output = scheduler.schedule()
        scheduled = time.perf_counter() - started
        reading = {i for i in output.num_scheduled_tokens if scheduler.requests[i].is_prefill_chunk}
        reported = harness.answer(output, {}, reading)
        for request_id, sampled in zip(reported.req_ids, reported.sampled_token_ids, strict=True):
            if sampled and scheduler.requests[request_id].num_output_tokens + 1 >= self._lengths[request_id]:
                sampled[0] = harness.STOP_TOKEN
        started = time.perf_counter()
        scheduler.get_grammar_bitmask(output)
        self.beside += time.perf_counter() - started
        if self._model:
            WALK.sum()
        started = time.perf_counter()
        scheduler.update_from_output(output, reported)
        return scheduled + time.perf_counter() - started

    def round(self, collector: bool) -> tuple[float, float]:
        """Mean microseconds of a step over one round, and of what is done beside the model."""
        gc.collect()
        if not collector:
            gc.disable()
        for _ in range(UNTIMED_STEPS):
            self._step()
        self.beside, before = 0.0, self.number
        taken = sum(self._step() for _ in range(STEPS_A_ROUND))
        gc.enable()
        self.ended_a_step.append((self.number - before) / STEPS_A_ROUND)
        return 1e6 * taken / STEPS_A_ROUND, 1e6 * self.beside / STEPS_A_ROUND


def measure(
    running: int, waiting: int, rounds: int, asynchronous: bool, collector: bool, foretold: bool, model: bool
) -> dict[str, Any]:
    """Alternate both arms and return medians with intervals, in microseconds a step."""
    pair = assets.prepare(size=widen_model.SMALL, dtype="float32")
    config = harness.engine_config(pair.target, 0, running, asynchronous)
    deployment_env.set_deployment(
        resolve(None, ["speculation.plugin=off", "batching.plugin=similarity", "batching.keep_lengths=false"])
    )
    arms = {
        "stock": Arm(AsyncScheduler if asynchronous else Scheduler, config, running, waiting, foretold, model),
        "ours": Arm(create_scheduler, config, running, waiting, foretold, model),
    }
    # As an engine core does: what lives as long as the server is not collected again and again.
    gc.collect()
    gc.freeze()
    times: dict[str, list[float]] = {name: [] for name in arms}
    beside: list[float] = []
    for number in range(rounds):
        for name in list(arms) if number % 2 else list(arms)[::-1]:
            taken, while_running = arms[name].round(collector)
            times[name].append(taken)
            if name == "ours":
                beside.append(while_running)
    return {
        "scheduling": "asynchronous" if asynchronous else "synchronous",
        "running": running,
        "waiting": waiting,
        "rounds": rounds,
        "collector": collector,
        "lengths": "foretold" if foretold else "hidden",
        "between": "model" if model else "nothing",
        "ended_a_step": {name: statistics.mean(arm.ended_a_step) for name, arm in arms.items()},
        "stock_us": vars(median_interval(times["stock"])),
        "ours_us": vars(median_interval(times["ours"])),
        "ratio": vars(ratio_interval(times["ours"], times["stock"])),
        "while_the_model_runs_us": vars(median_interval(beside)),
    }


def main() -> None:
    """Measure, print and write ``benchmarks/results/queue_overhead.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--collector", action="store_true", help="let Python's garbage collector run within rounds")
    parser.add_argument("--lengths", default="hidden,foretold")
    parser.add_argument("--between", default="model,nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/queue_overhead.json")
    options = parser.parse_args()
    cells = [
        measure(
            options.running,
            options.waiting,
            options.rounds,
            asynchronous,
            options.collector,
            kind == "foretold",
            between == "model",
        )
        for between in options.between.split(",")
        for kind in options.lengths.split(",")
        for asynchronous in (False, True)
    ]
    for cell in cells:
        print(
            f"{cell['scheduling']}, {cell['running']} running, {cell['waiting']} waiting, lengths "
            f"{cell['lengths']}, between {cell['between']}: stock {cell['stock_us']['median']:.0f} µs a step, ours "
            f"{cell['ours_us']['median']:.0f} µs "
            f"({cell['ratio']['median']:.2f}× [{cell['ratio']['low']:.2f}, {cell['ratio']['high']:.2f}]); "
            f"while the model runs {cell['while_the_model_runs_us']['median']:.0f} µs; ended a step: stock "
            f"{cell['ended_a_step']['stock']:.2f}, ours {cell['ended_a_step']['ours']:.2f}"
        )
    write(options.output, cells)


if __name__ == "__main__":
    main()
