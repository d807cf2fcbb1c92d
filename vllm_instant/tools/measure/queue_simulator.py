"""A server made of slots: what a batching policy would do to a queue, in milliseconds and without a model.

A request holds a slot for as long as its prompt and its answer take; the slots do not slow each other down. That is
less than a real engine does and enough for what a queue decides: who waits how long, against first come, first served
over the same requests.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.interfaces import Admission, RequestState, SchedulerSnapshot, SchedulingPolicy
from vllm_instant.scheduling.admission import Batching
from vllm_instant.scheduling.request_registry import RequestRegistry

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """One request of a simulated stream."""

    arrival: float
    """Seconds."""
    output_tokens: int
    prompt_tokens: int = 16
    max_tokens: int = 4096
    prompt: Sequence[int] = ()
    """Token ids, as far as a policy shall see them."""
    told: int | None = None
    """The output length that its client tells, if it does."""


@dataclass(frozen=True)
class Served:
    """When the jobs started and ended, in their order, in seconds."""

    arrival: Array
    start: Array
    end: Array

    @property
    def waits(self) -> Array:
        """From arrival to start."""
        return self.start - self.arrival

    @property
    def latencies(self) -> Array:
        """From arrival to end."""
        return self.end - self.arrival


class _AsTheyCome(SchedulingPolicy):
    def admit(self, moment: SchedulerSnapshot) -> Admission:
        return Admission()


def serve(
    jobs: Sequence[Job],
    slots: int,
    policy: SchedulingPolicy | None = None,
    *,
    seconds_per_token: float = 0.03,
    seconds_per_prompt_token: float = 0.0005,
) -> Served:
    """Serve jobs, which must be sorted by arrival, with a policy (None: first come, first served).

    Raises:
        RuntimeError: when the policy raised or broke its contract.

    """
    now = 0.0
    contained = GuardedPlugin("batching", "simulated", policy if policy is not None else _AsTheyCome())
    batching = Batching(contained, clock=lambda: now)
    live = RequestRegistry()
    states: list[RequestState | None] = [None] * len(jobs)
    waiting: list[int] = []
    running: list[tuple[float, int]] = []
    start, end = np.full(len(jobs), np.nan), np.full(len(jobs), np.nan)
    coming = 0

    def moment() -> SchedulerSnapshot:
        here, there = [_known(states[n]) for n in waiting], [_known(states[n]) for _, n in running]
        return SchedulerSnapshot(here, there, now, slots, free_kv_tokens=1_000_000)

    while coming < len(jobs) or waiting or running:
        while coming < len(jobs) and jobs[coming].arrival <= now:
            job = jobs[coming]
            state = RequestState(
                f"job {coming}",
                job.prompt_tokens,
                job.max_tokens,
                0.0,
                prompt_token_ids=job.prompt,
                extra_args={} if job.told is None else {"instant_output_tokens": job.told},
            )
            live.admit(state)
            batching.enter(state)
            # Its time of arrival is exact, not that of the event at which it was noticed.
            state.arrival = job.arrival
            states[coming] = state
            waiting.append(coming)
            coming += 1
        while running and running[0][0] <= now:
            _, number = heapq.heappop(running)
            state = _known(states[number])
            state.num_output_tokens = jobs[number].output_tokens
            batching.finished(state, complete=True)
            live.forget(state.request_id)
        for _, number in running:
            reading = seconds_per_prompt_token * jobs[number].prompt_tokens
            _known(states[number]).num_output_tokens = max(0, int((now - start[number] - reading) / seconds_per_token))
        started = 0
        while waiting and len(running) < slots:
            admission = batching.admit(moment())
            if admission.max_num_admitted is not None and started >= admission.max_num_admitted:
                break
            number = waiting.pop(_first(admission, [_known(states[n]).request_id for n in waiting]))
            start[number] = now
            service = (
                seconds_per_prompt_token * jobs[number].prompt_tokens + seconds_per_token * jobs[number].output_tokens
            )
            end[number] = now + service
            heapq.heappush(running, (end[number], number))
            oldest = _known(states[waiting[0]]).arrival if waiting else now
            batching.started(_known(states[number]), oldest)
            started += 1
        if batching.thinks:
            batching.on_model_executing(moment())
        events = [running[0][0]] if running else []
        if coming < len(jobs):
            events.append(jobs[coming].arrival)
        if events:
            now = max(now, min(events))
    if contained.disabled:
        raise RuntimeError(f"the policy raised: {dict(contained.failures)}")
    return Served(np.array([job.arrival for job in jobs]), start, end)


def _first(admission: Admission, waiting: Sequence[str]) -> int:
    """The place in line of the one that starts next."""
    for request_id in admission.by_id:
        if request_id in waiting:
            return waiting.index(request_id)
    return 0 if admission.by_id else next(iter(admission.order), 0)


def _known(state: RequestState | None) -> RequestState:
    if state is None:
        raise ValueError("not arrived")
    return state
