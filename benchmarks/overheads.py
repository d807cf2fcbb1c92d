"""What this package's own code costs per step: policy, draft budgets, the ``similarity`` queue, the circuit breaker.

    .venv/bin/python benchmarks/overheads.py policy [--steps 1800]
    .venv/bin/python benchmarks/overheads.py scheduler [--running 256] [--drafts 4] [--rounds 40]
    .venv/bin/python benchmarks/overheads.py breaker [--rounds 40]
    .venv/bin/python benchmarks/overheads.py queue [--running 256] [--waiting 1000] [--rounds 30] [--collector]

``policy``: microseconds of planning a step and of learning from one, by number of requests. Half of the requests have
predictable drafts; and beside them the same where no draft is ever accepted, so that almost none are made. Both calls
happen while the model runs; the scheduler waits for a plan only when a new request appears. One core, no engine.

``scheduler`` and ``queue``: vLLM's scheduler classes in this process, stock and ours in alternating rounds, with a
model's configuration and no model. A step is everything between two model executions: ``schedule``,
``update_from_output``, and in ``scheduler`` also ``update_draft_token_ids`` (not with asynchronous scheduling), in
``queue`` also adding requests in the place of ended ones.

``breaker``: steps of our scheduler with drafts as they are, the same while every guarded call is a plain call of the
plugin, and as they are once more, whose ratio to the first is the noise floor; one scheduler, in turn.

``queue``: running the model evicts the scheduler's memory from the caches of a core. ``between: model`` stands for
that: both schedulers find their caches emptied after ``schedule``, by a walk through more memory than they hold.
``between: nothing`` leaves them as they are, so that stock finds its memory where it was and ours finds what its
background work left, which happens in no server; a server whose model runs on another device lies between the two.
``lengths: unpredictable``: answers end at a length that nothing predicts. ``predictable``: the length is the request's
``max_tokens``, which the policy learns to use, so that requests start in another order than they arrived.
The background work in ``get_grammar_bitmask`` is timed by itself. Three steps before each round are not timed: the
caches held the other scheduler. Python's garbage collector runs between rounds and not within, since a collection takes
as long as half a step and it is chance whose allocation triggers it; ``--collector`` leaves it on.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import overhead_arms
from results import HERE, write

from vllm_instant.tools.measure.statistics import median_interval, ratio_interval

Cell = dict[str, Any]


def alternated(stock: Callable[[], float], ours: Callable[[], float], rounds: int) -> Cell:
    """Microseconds per step of two schedulers in alternating rounds."""
    arms = {"stock": stock, "ours": ours}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms) if number % 2 else list(arms)[::-1]:
            times[name].append(arms[name]())
    difference = [a - b for a, b in zip(times["ours"], times["stock"], strict=True)]
    return {
        "stock_us": vars(median_interval(times["stock"])),
        "ours_us": vars(median_interval(times["ours"])),
        "overhead_us": vars(median_interval(difference)),
        "ratio": vars(ratio_interval(times["ours"], times["stock"])),
    }


def policy(options: argparse.Namespace) -> list[Cell]:
    """Planning and learning by number of requests, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cells = []
    for count in (1, 4, 16, 64, 256):
        predictable = overhead_arms.policy_microseconds(count, options.steps, overhead_arms.HALF_PREDICTABLE)
        hopeless = overhead_arms.policy_microseconds(count, options.steps, overhead_arms.HOPELESS)
        cells.append({"requests": count, **predictable, "hopeless_drafts": hopeless})
    return cells


def scheduler(options: argparse.Namespace) -> list[Cell]:
    """Draft budgets in the scheduler, synchronous and asynchronous."""
    cells = []
    for asynchronous in (False, True):
        arms = overhead_arms.decoding_arms(options.running, options.drafts, asynchronous)
        for arm in arms:
            arm.round()
        found = alternated(arms[0].round, arms[1].round, options.rounds)
        cells.append({**_mode(asynchronous), "running": options.running, "drafts": options.drafts, **found})
    return cells


def breaker(options: argparse.Namespace) -> list[Cell]:
    """The circuit breaker's share of a step: clock, watchdog entry and handler of each call of a plugin."""
    cells = []
    for running in (1, 16, options.running):
        arm = overhead_arms.decoding_arms(running, options.drafts, False)[1]
        arm.round()
        times: dict[str, list[float]] = {"guarded": [], "plain": [], "again": []}
        for number in range(options.rounds):
            for name in [*times][number % 3 :] + [*times][: number % 3]:
                with overhead_arms.unguarded() if name == "plain" else nullcontext():
                    times[name].append(arm.round())
        cells.append(
            {
                "running": running,
                "calls_per_step": overhead_arms.guarded_calls_per_step(arm),
                "guarded_us": vars(median_interval(times["guarded"])),
                "plain_us": vars(median_interval(times["plain"])),
                "ratio": vars(ratio_interval(times["guarded"], times["plain"])),
                "floor": vars(ratio_interval(times["again"], times["guarded"])),
            }
        )
    return cells


def queue(options: argparse.Namespace) -> list[Cell]:
    """The queue's policy in the scheduler, synchronous and asynchronous, under all conditions that were asked for."""
    conditions = itertools.product(options.between.split(","), options.lengths.split(","), (False, True))
    cells = []
    for between, lengths, asynchronous in conditions:
        stock, ours = overhead_arms.queue_arms(
            options.running,
            options.waiting,
            asynchronous,
            predictable=lengths == "predictable",
            model_between=between == "model",
            collector=options.collector,
        )
        found = alternated(stock.round, ours.round, options.rounds)
        found.pop("overhead_us")
        cells.append(
            {
                **_mode(asynchronous),
                "running": options.running,
                "waiting": options.waiting,
                "rounds": options.rounds,
                "collector": options.collector,
                "lengths": lengths,
                "between": between,
                "ended_per_step": {"stock": stock.ended_per_step(), "ours": ours.ended_per_step()},
                **found,
                "while_the_model_runs_us": vars(median_interval(ours.background)),
            }
        )
    return cells


def _mode(asynchronous: bool) -> dict[str, str]:
    return {"scheduling": "asynchronous" if asynchronous else "synchronous"}


PARTS = {"policy": policy, "scheduler": scheduler, "breaker": breaker, "queue": queue}


def main() -> None:
    """Measure one part, print, write ``benchmarks/results/overheads.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--collector", action="store_true", help="let Python's garbage collector run within rounds")
    parser.add_argument("--lengths", default="unpredictable,predictable")
    parser.add_argument("--between", default="model,nothing")
    parser.add_argument("--output", type=Path, default=HERE / "results/overheads.json")
    options = parser.parse_args()
    cells = PARTS[options.part](options)
    for cell in cells:
        print(", ".join(f"{name} {shown(value)}" for name, value in cell.items()), flush=True)
    write(options.output, cells, options.part)


def shown(value: Any) -> str:
    """A value of a cell for a terminal."""
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
    return str(value)


if __name__ == "__main__":
    main()
