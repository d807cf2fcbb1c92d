"""A simulated server: runs a scheduling policy on a queue in milliseconds, without a model.

A request holds a slot for the service time of its prompt and its answer, independent of the requests in other slots.
That is enough to compare the waits of the same requests under a policy and under first come, first served.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.scheduling import Admission, SchedulerSnapshot, SchedulingPolicy
from vllm_instant.scheduling.admission import AdmissionController
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
    """Token ids that the policy sees; they need not agree with ``prompt_tokens``."""
    hinted_tokens: int | None = None
    """Output length that the client sends as a hint, if it sends one."""

    @property
    def hint(self) -> dict[str, int]:
        """The hint as ``vllm_xargs``."""
        return {} if self.hinted_tokens is None else {"instant_output_tokens": self.hinted_tokens}


@dataclass(frozen=True)
class SimulatedTimes:
    """When each job arrived, started and ended, in seconds, in the order of the jobs."""

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


class _FirstComeFirstServed(SchedulingPolicy):
    def admit(self, snapshot: SchedulerSnapshot) -> Admission:
        return Admission()


class _SimulatedServer:
    """The state of one simulation; a job is referred to by its place in ``jobs``."""

    def __init__(
        self, jobs: Sequence[Job], slots: int, policy: SchedulingPolicy, per_token: float, per_prompt_token: float
    ) -> None:
        self.now = 0.0
        self.guarded = GuardedPlugin("batching", "simulated", policy)
        self.start, self.end = np.full(len(jobs), np.nan), np.full(len(jobs), np.nan)
        self._jobs, self._slots = jobs, slots
        self._per_token, self._per_prompt_token = per_token, per_prompt_token
        self._admission = AdmissionController(self.guarded, clock=lambda: self.now)
        self._registry = RequestRegistry()
        self._states: list[RequestState] = []
        """Of the jobs that have arrived."""
        self._waiting: list[int] = []
        self._running: list[tuple[float, int]] = []
        """A heap by end time."""

    def run(self) -> None:
        """Advance from event to event until every job has ended or no event is left."""
        while len(self._states) < len(self._jobs) or self._waiting or self._running:
            self._arrivals()
            self._ends()
            self._generate()
            self._starts()
            if self._admission.has_background_work:
                self._admission.on_model_executing(self._snapshot())
            self._advance()

    def _snapshot(self) -> SchedulerSnapshot:
        waiting = [self._states[job] for job in self._waiting]
        running = [self._states[job] for _, job in self._running]
        return SchedulerSnapshot(waiting, running, self.now, self._slots, free_kv_tokens=1_000_000)

    def _arrivals(self) -> None:
        while len(self._states) < len(self._jobs) and self._jobs[len(self._states)].arrival <= self.now:
            number = len(self._states)
            job = self._jobs[number]
            state = RequestState(
                f"job {number}",
                job.prompt_tokens,
                job.max_tokens,
                0.0,
                prompt_token_ids=job.prompt,
                extra_args=job.hint,
            )
            self._registry.admit(state)
            self._admission.enter(state)
            # The exact time of arrival, not that of the event at which it is processed.
            state.arrival_time = job.arrival
            self._states.append(state)
            self._waiting.append(number)

    def _ends(self) -> None:
        while self._running and self._running[0][0] <= self.now:
            _, job = heapq.heappop(self._running)
            state = self._states[job]
            state.num_output_tokens = self._jobs[job].output_tokens
            self._admission.finished(state, complete=True)
            self._registry.forget(state.request_id)

    def _generate(self) -> None:
        for _, job in self._running:
            elapsed = self.now - self.start[job] - self._per_prompt_token * self._jobs[job].prompt_tokens
            self._states[job].num_output_tokens = max(0, int(elapsed / self._per_token))

    def _starts(self) -> None:
        num_started = 0
        while self._waiting and len(self._running) < self._slots:
            admission = self._admission.admit(self._snapshot())
            if admission.max_num_admitted is not None and num_started >= admission.max_num_admitted:
                break
            job = self._waiting.pop(_first_place(admission, [self._states[n].request_id for n in self._waiting]))
            self.start[job] = self.now
            prompt_tokens, output_tokens = self._jobs[job].prompt_tokens, self._jobs[job].output_tokens
            self.end[job] = self.now + (self._per_prompt_token * prompt_tokens + self._per_token * output_tokens)
            heapq.heappush(self._running, (self.end[job], job))
            oldest = self._states[self._waiting[0]].arrival_time if self._waiting else self.now
            self._admission.started(self._states[job], oldest)
            num_started += 1

    def _advance(self) -> None:
        events = [self._running[0][0]] if self._running else []
        if len(self._states) < len(self._jobs):
            events.append(self._jobs[len(self._states)].arrival)
        if events:
            self.now = max(self.now, min(events))


def serve(
    jobs: Sequence[Job],
    slots: int,
    policy: SchedulingPolicy | None = None,
    *,
    seconds_per_token: float = 0.03,
    seconds_per_prompt_token: float = 0.0005,
) -> SimulatedTimes:
    """Serve jobs, which must be sorted by arrival, with a policy (None: first come, first served).

    Raises:
        RuntimeError: when the policy raised or broke its contract.

    """
    policy = _FirstComeFirstServed() if policy is None else policy
    server = _SimulatedServer(jobs, slots, policy, seconds_per_token, seconds_per_prompt_token)
    server.run()
    if server.guarded.disabled:
        raise RuntimeError(f"the policy raised: {dict(server.guarded.failures)}")
    return SimulatedTimes(np.array([job.arrival for job in jobs]), server.start, server.end)


def _first_place(admission: Admission, waiting: Sequence[str]) -> int:
    """The place in the queue of the next request to start."""
    for request_id in admission.request_ids:
        if request_id in waiting:
            return waiting.index(request_id)
    return 0 if admission.request_ids else next(iter(admission.order), 0)
