"""What ``overheads.py`` times: the ``goodput`` policy by itself, and vLLM's scheduler classes, stock and ours."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import results  # noqa: F401  makes scheduler_harness importable
import scheduler_harness as harness
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_instant import RequestState, StepOutcome, UpcomingStep
from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.settings import resolve
from vllm_instant.patches.scheduler import create_scheduler
from vllm_instant.tools.demo import assets, widen_model
from vllm_instant.tools.measure.statistics import median_interval
from vllm_instant_plugins.goodput.policy import GoodputPolicy

MAX_DRAFT_TOKENS = 8
STEPS_PER_MEAN = 12
"""A figure is the mean of this many neighbouring steps: a step without drafts reuses the plan of an earlier one."""
HALF_PREDICTABLE = (0.8, 0.2), 2e-5, 64
HOPELESS = (0.0, 0.0), 2e-4, 0
"""Acceptance probability of every other request; seconds per row beyond a number of rows that cost nothing."""

DECODING_STEPS_PER_ROUND = 20
TOKENS_BEFORE_RESTART = 400
QUEUE_STEPS_PER_ROUND = 25
UNTIMED_STEPS = 3
LENGTHS = (20, 300)
WALK = np.ones(1 << 23)
"""64 MiB: more than the cores' caches hold."""


def policy_microseconds(count: int, steps: int, workload: tuple[tuple[float, float], float, int]) -> dict[str, Any]:
    """Microseconds of planning and learning with ``count`` requests; the workload is as ``HALF_PREDICTABLE``."""
    policy = GoodputPolicy(MAX_DRAFT_TOKENS, count)
    acceptance, row_seconds, free_rows = workload
    states = [RequestState(f"r{i}", 100, 10_000, i % 2 * 1.0, index=i) for i in range(count)]
    for state in states:
        policy.enter(state)
    generator = np.random.default_rng(0)
    num_draft_tokens = [0] * count
    planning, learning = [], []
    for number in range(1, steps + 1):
        # The scheduler makes a new list of the same requests for each step.
        upcoming = UpcomingStep(list(states), MAX_DRAFT_TOKENS, number=number)
        began = time.perf_counter()
        planned = policy.get_num_draft_tokens(upcoming)
        planning.append(time.perf_counter() - began)
        accepted = [min(k, int(generator.geometric(1 - acceptance[i % 2])) - 1) for i, k in enumerate(num_draft_tokens)]
        rows = count + sum(num_draft_tokens)
        seconds = 0.006 + row_seconds * max(0, rows - free_rows)
        outcome = StepOutcome(
            list(states), num_draft_tokens, accepted, rows, seconds, count, number, max(num_draft_tokens)
        )
        began = time.perf_counter()
        policy.observe(outcome)
        learning.append(time.perf_counter() - began)
        num_draft_tokens = list(planned)
    counted = slice(steps // 3, None)
    return {
        "planning_us": vars(median_interval(_means(planning[counted]))),
        "learning_us": vars(median_interval(_means(learning[counted]))),
        "num_draft_tokens_at_the_end": sum(num_draft_tokens),
    }


def _means(seconds: Sequence[float]) -> list[float]:
    """Means of neighbouring steps, in microseconds."""
    starts = range(0, len(seconds) - STEPS_PER_MEAN + 1, STEPS_PER_MEAN)
    return [1e6 * statistics.fmean(seconds[start : start + STEPS_PER_MEAN]) for start in starts]


class DecodingArm:
    """One scheduler with requests that decode; started again before its requests reach the model's length."""

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
        """Mean microseconds per step over one round."""
        if self.produced > TOKENS_BEFORE_RESTART:
            self._restart()
        return 1e6 * sum(self._step() for _ in range(DECODING_STEPS_PER_ROUND)) / DECODING_STEPS_PER_ROUND


def decoding_arms(running: int, drafts: int, asynchronous: bool) -> list[DecodingArm]:
    """Stock's scheduler and ours, with a fixed number of drafts: the mechanism alone."""
    deployment_env.set_deployment(resolve(None, ["speculation.plugin=fixed", f"speculation.num_draft_tokens={drafts}"]))
    config = _config(drafts, running, asynchronous)
    return [
        DecodingArm(factory, config, running, drafts, asynchronous)
        for factory in (_stock(asynchronous), create_scheduler)
    ]


@contextmanager
def unguarded() -> Iterator[None]:
    """Calls of plugins are plain calls, without the circuit breaker."""

    def plain(self: GuardedPlugin[Any], hook: str, run: Any, otherwise: Any) -> Any:
        return run(self.instance)

    with patch.object(GuardedPlugin, "call", plain):
        yield


def guarded_calls_per_step(arm: DecodingArm) -> float:
    """The mean number of calls of plugins in one step."""
    with patch.object(GuardedPlugin, "call", autospec=True, side_effect=GuardedPlugin.call) as called:
        arm.round()
    return called.call_count / DECODING_STEPS_PER_ROUND


class QueueArm:
    """One scheduler with a full batch and a queue that is refilled with as many requests as ended."""

    def __init__(
        self,
        factory: Any,
        config: Any,
        running: int,
        waiting: int,
        *,
        predictable: bool,
        model_between: bool,
        collector: bool,
    ) -> None:
        self._predictable, self._model_between, self._collector = predictable, model_between, collector
        self._lengths: dict[str, int] = {}
        self.scheduler = harness.make_scheduler(factory, config)
        self._present, self._number, self._background = running + waiting, 0, 0.0
        self._ended: list[float] = []
        self.background: list[float] = []
        """Mean microseconds per step of the work that is done while the model runs, by round."""
        self._random = random.Random(0)
        self._fill()
        # The first generation of requests began together; wait until it has ended.
        for _ in range(LENGTHS[1]):
            self._step()

    def _fill(self) -> None:
        while len(self.scheduler.requests) < self._present:
            self._number += 1
            tokens = self._random.randrange(*LENGTHS)
            max_tokens = tokens if self._predictable else LENGTHS[1]
            request = harness.make_request(self._number, prompt_tokens=48, max_tokens=max_tokens)
            self._lengths[request.request_id] = tokens
            self.scheduler.add_request(request)

    def _step(self) -> float:
        scheduler = self.scheduler
        started = time.perf_counter()
        self._fill()
        output = scheduler.schedule()
        scheduled = time.perf_counter() - started
        prefilling = {i for i in output.num_scheduled_tokens if scheduler.requests[i].is_prefill_chunk}
        reported = harness.answer(output, {}, prefilling)
        for request_id, sampled in zip(reported.req_ids, reported.sampled_token_ids, strict=True):
            if sampled and scheduler.requests[request_id].num_output_tokens + 1 >= self._lengths[request_id]:
                sampled[0] = harness.STOP_TOKEN
        started = time.perf_counter()
        scheduler.get_grammar_bitmask(output)
        self._background += time.perf_counter() - started
        if self._model_between:
            WALK.sum()
        started = time.perf_counter()
        scheduler.update_from_output(output, reported)
        return scheduled + time.perf_counter() - started

    def round(self) -> float:
        """Mean microseconds per step over one round."""
        gc.collect()
        if not self._collector:
            gc.disable()
        for _ in range(UNTIMED_STEPS):
            self._step()
        self._background, before = 0.0, self._number
        seconds = sum(self._step() for _ in range(QUEUE_STEPS_PER_ROUND))
        gc.enable()
        self._ended.append((self._number - before) / QUEUE_STEPS_PER_ROUND)
        self.background.append(1e6 * self._background / QUEUE_STEPS_PER_ROUND)
        return 1e6 * seconds / QUEUE_STEPS_PER_ROUND

    def ended_per_step(self) -> float:
        """Mean number of requests that ended in a step; each costs vLLM its time."""
        return statistics.mean(self._ended)


def queue_arms(running: int, waiting: int, asynchronous: bool, **conditions: bool) -> list[QueueArm]:
    """Stock's scheduler and ours with ``similarity``, without speculation."""
    deployment_env.set_deployment(
        resolve(None, ["speculation.plugin=off", "batching.plugin=similarity", "batching.keep_lengths=false"])
    )
    config = _config(0, running, asynchronous)
    arms = [
        QueueArm(factory, config, running, waiting, **conditions)
        for factory in (_stock(asynchronous), create_scheduler)
    ]
    # As an engine core does: objects that live as long as the server are not collected again and again.
    gc.collect()
    gc.freeze()
    return arms


def _config(drafts: int, running: int, asynchronous: bool) -> Any:
    pair = assets.prepare(size=widen_model.SMALL, dtype="float32")
    return harness.engine_config(pair.target, drafts, running, asynchronous)


def _stock(asynchronous: bool) -> Any:
    return AsyncScheduler if asynchronous else Scheduler
