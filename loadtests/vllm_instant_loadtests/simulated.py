"""Simulated recordings: an engine of steps under open-loop traffic, with disturbances at known times.

Much simpler than vLLM, and sufficient for tests of the analysis: queueing, the metrics that a server would report, and
the true cause of every spike.

It does not build on ``vllm_instant.tools.measure.simulator``, which drives a drafting policy with a fixed batch of
endless requests: that one has no arrivals, queue, prefill or KV cache, and this one has no policy. Nor does it build
on ``queue_simulator``, which computes the waits of an order without steps. All they share is a linear step time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_instant.tools.measure import server_metrics as m
from vllm_instant_loadtests import causes, host_causes
from vllm_instant_loadtests import host_evidence as host
from vllm_instant_loadtests.escalation_cause import ESCALATION
from vllm_instant_loadtests.run_recorder import (
    Disturbance,
    GeneratorSample,
    MetricsSample,
    RecordedRequest,
    RecordedRun,
)

SERVER = "simulated"
CORES = 2.0
DEEP_SHARE, DEEP_TTFT, DEEP_ITL = 0.6, 1.2, 0.06
"""Share of the requests that are escalated in a disturbance, and the seconds of their first token and further ones."""


@dataclass(frozen=True)
class SimulatedEngine:
    """Step times in seconds, and the limits of the batch."""

    step: float = 0.020
    per_request: float = 0.0008
    per_prompt_token: float = 0.0004
    noise: float = 0.06
    """Standard deviation of the log step time; half of its variance drifts over seconds."""
    hiccups: float = 0.2
    """Rate of slow steps per second, as on any machine."""
    seats: int = 24
    kv_tokens: int = 20_000
    draft_tokens: int = 0
    accepted: float = 0.7
    """Conditional acceptance probability of a draft token."""
    chunk: int = 2048
    """Maximum number of prompt tokens in one step."""


@dataclass(frozen=True)
class SimulatedTraffic:
    """The undisturbed traffic."""

    rate: float = 3.0
    prompt: tuple[int, int] = (40, 80)
    answer: tuple[int, int] = (60, 120)


@dataclass
class _Live:
    due: float
    prompt: int
    answer: int
    kind: str
    leave: int | None
    deep: bool = False
    """Answered by another server: it takes no part in the steps of this one."""
    read: int = 0
    tokens: int = 0
    started: float | None = None
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def kv(self) -> int:
        return self.read + self.tokens


def simulate_run(
    seconds: float = 60.0,
    events: Sequence[Disturbance] = (),
    *,
    engine: SimulatedEngine | None = None,
    load: SimulatedTraffic | None = None,
    slower: float = 1.0,
    seed: int = 0,
) -> RecordedRun:
    """Simulate a run.

    Args:
        seconds: length of the traffic.
        events: disturbances; ``cause`` decides what happens between ``began`` and ``ended``. ``causes.UNKNOWN``
            multiplies every step time by ``slower`` and does nothing else; the causes of the machine do so, and its
            counters show them.
        engine: step times and limits.
        load: the undisturbed traffic.
        slower: see ``events``.
        seed: of all random numbers.

    """
    return _Simulation(
        engine or SimulatedEngine(), load or SimulatedTraffic(), events, slower, np.random.default_rng(seed)
    ).run(seconds)


class _Simulation:
    def __init__(
        self,
        engine: SimulatedEngine,
        load: SimulatedTraffic,
        events: Sequence[Disturbance],
        slower: float,
        random: np.random.Generator,
    ) -> None:
        self.engine, self.load, self.events, self.slower, self.random = engine, load, events, slower, random
        self.now = 0.0
        self.drift = 0.0
        self.waiting: deque[_Live] = deque()
        self.running: list[_Live] = []
        self.ended: list[RecordedRequest] = []
        self.samples: list[MetricsSample] = []
        self.totals = dict.fromkeys(
            (m.PREEMPTIONS, m.PROMPT_TOKENS, m.GENERATED, m.STEPS, m.STEP_TOKENS, m.QUEUE_SECONDS, m.QUEUED), 0.0
        )
        if engine.draft_tokens:
            self.totals |= dict.fromkeys((m.DRAFTS, m.DRAFTED, m.ACCEPTED), 0.0)
        self.compiled = False
        counters = (host.THROTTLED_SECONDS, host.STEAL_SECONDS, host.MEMORY_STALL_SECONDS, host.MAJOR_FAULTS)
        self.host = dict.fromkeys((*counters, host.OWN_CPU_SECONDS, host.OTHER_CPU_SECONDS), 0.0)

    def run(self, seconds: float) -> RecordedRun:
        coming = deque(sorted(self._traffic(seconds), key=lambda live: live.due))
        next_sample = 0.5
        while coming or self.waiting or self.running:
            while coming and coming[0].due <= self.now:
                live = coming.popleft()
                if live.deep:
                    self._answer_elsewhere(live)
                else:
                    self.waiting.append(live)
            if not self.waiting and not self.running:
                if not coming:
                    break
                self.now = coming[0].due
                continue
            before = self.now
            self._admit()
            self._step()
            while next_sample <= self.now:
                if not self._in(causes.STOPPED, next_sample):
                    self.samples.append(self._sample(next_sample))
                next_sample += 0.5
            assert self.now > before  # noqa: S101  otherwise the loop never ends
        client = [self._client(float(at)) for at in np.arange(0.5, self.now, 0.5)]
        segment = {"server": SERVER, "began": 0.0, "ended": self.now, "from": 0.0, "until": seconds, "number": 0}
        about = {"scenario": {"name": "simulated"}, "servers": [{"name": SERVER}], "segments": [segment]}
        return RecordedRun(about, self.ended, self.samples, [], client, list(self.events))

    def _traffic(self, seconds: float) -> list[_Live]:
        # One arrival per slot: Poisson arrivals would form random bursts that are no disturbance.
        slots = np.arange(round(self.load.rate * seconds))
        times = (slots + self.random.random(len(slots))) / self.load.rate
        lives = [self._live(at, "steady") for at in times]
        for live in lives:
            live.deep = self._in(ESCALATION, live.due) and self.random.random() < DEEP_SHARE
        for event in self.events:
            lives += self._injected(event)
        return lives

    def _injected(self, event: Disturbance) -> list[_Live]:
        """The requests that a disturbance adds."""
        length = event.ended - event.began
        extra = round(length * self.load.rate * 2.5)
        if event.cause == causes.COMPILE:
            return [self._live(event.began, "first of its length", prompt=2 * self.load.prompt[1])]
        count, kind, given = {
            causes.BATCH: (round(1.6 * extra), "burst", {}),
            causes.QUEUEING: (extra + 2 * self.engine.seats, "burst", {}),
            causes.MEMORY: (self.engine.kv_tokens // 300 + 4, "long answers", {"answer": 400}),
            causes.PREFILL: (max(2, round(length)), "documents", {"prompt": 1800, "answer": 4}),
            causes.DISCONNECTS: (2 * extra, "leaving", {}),
        }.get(event.cause, (0, "", {}))
        lives = []
        for _ in range(count):
            at = float(self.random.uniform(event.began, event.ended))
            leave = int(self.random.integers(1, 6)) if event.cause == causes.DISCONNECTS else None
            lives.append(self._live(at, kind, leave=leave, **given))
        return lives

    def _live(
        self, due: float, kind: str, prompt: int | None = None, answer: int | None = None, leave: int | None = None
    ) -> _Live:
        drawn = [int(self.random.integers(low, high + 1)) for low, high in (self.load.prompt, self.load.answer)]
        return _Live(float(due), prompt or drawn[0], answer or drawn[1], kind, leave)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.engine.seats:
            used = sum(live.kv for live in self.running)
            if used + self.waiting[0].prompt + self.waiting[0].tokens > self.engine.kv_tokens:
                break
            live = self.waiting.popleft()
            if live.started is None:
                live.started = self.now
                self.totals[m.QUEUE_SECONDS] += self.now - live.due
                self.totals[m.QUEUED] += 1
            self.running.append(live)

    def _step(self) -> None:
        self._preempt()
        decoding = [live for live in self.running if live.read >= live.prompt + live.tokens]
        prompt_tokens, prefilled = self._prefill()
        self.now += self._duration(len(decoding), prompt_tokens)
        self.totals[m.STEPS] += 1
        self.totals[m.STEP_TOKENS] += len(decoding) * (1 + self.engine.draft_tokens) + prompt_tokens
        seen = self._seen(self.now)
        for live in decoding:
            self._bring(live, 1 + self._accepted(), seen)
        for live in prefilled:
            self.totals[m.PROMPT_TOKENS] += live.prompt if not live.tokens else 0
            self._bring(live, 1, seen)
        self.running = [live for live in self.running if not self._finish(live, seen)]

    def _preempt(self) -> None:
        """Take the KV blocks of the latest requests until one more token per request fits."""
        while (
            len(self.running) > 1 and sum(live.kv for live in self.running) + len(self.running) > self.engine.kv_tokens
        ):
            lost = self.running.pop()
            lost.read = 0
            self.waiting.appendleft(lost)
            self.totals[m.PREEMPTIONS] += 1

    def _prefill(self) -> tuple[int, list[_Live]]:
        """Prefill one chunk; returns its number of tokens and the requests whose prefill is complete."""
        room, complete = self.engine.chunk, []
        for live in self.running:
            taken = min(live.prompt + live.tokens - live.read, room)
            if taken > 0:
                live.read += taken
                room -= taken
                if live.read >= live.prompt + live.tokens:
                    complete.append(live)
        return self.engine.chunk - room, complete

    def _duration(self, decoding: int, prompt_tokens: int) -> float:
        """Time of the step, disturbances included."""
        engine = self.engine
        took = engine.step + engine.per_request * decoding * (1 + engine.draft_tokens / 2)
        took = (took + engine.per_prompt_token * prompt_tokens) * self._luck()
        if self._in(causes.UNKNOWN, self.now) or any(self._in(cause, self.now) for cause in host_causes.HOST_CAUSES):
            took *= self.slower
        if self._in(causes.COMPILE, self.now) and not self.compiled:
            self.compiled = True
            took += next(e.ended - e.began for e in self.events if e.cause == causes.COMPILE)
        self._count_host(took)
        for event in self.events:
            if event.cause == causes.STOPPED and self.now < event.began < self.now + took:
                took += event.ended - event.began
        return took

    def _count_host(self, took: float) -> None:
        """What the machine's counters grow by in a step; where it is slowed down, the lost share of its time."""
        lost = took * (1 - 1 / self.slower)
        slowed = {cause: lost if self._in(cause, self.now) else 0.0 for cause in host_causes.HOST_CAUSES}
        wanted = CORES * (self.slower - 1) + 0.1  # cores beyond the free ones, which slow the server by the factor
        growth = {
            host.THROTTLED_SECONDS: slowed[host_causes.QUOTA],
            host.STEAL_SECONDS: CORES * slowed[host_causes.STEAL],
            host.MEMORY_STALL_SECONDS: slowed[host_causes.PAGING],
            host.MAJOR_FAULTS: 400 * slowed[host_causes.PAGING],
            host.OWN_CPU_SECONDS: took * (CORES - 0.2) - sum(slowed.values()),
            # Processes that want as much more than the free cores as slows the server down by the factor.
            host.OTHER_CPU_SECONDS: took * (0.1 + (wanted if slowed[host_causes.NEIGHBOUR] else 0.0)),
        }
        for name, value in growth.items():
            self.host[name] += value * float(self.random.uniform(0.9, 1.1))

    def _accepted(self) -> int:
        k = self.engine.draft_tokens
        if not k:
            return 0
        chance = 0.1 if self._in(causes.ACCEPTANCE, self.now) else self.engine.accepted
        rejected = np.flatnonzero(self.random.random(k) > chance)
        accepted = int(rejected[0]) if len(rejected) else k
        for name, value in ((m.DRAFTS, 1), (m.DRAFTED, k), (m.ACCEPTED, accepted)):
            self.totals[name] += value
        return accepted

    def _bring(self, live: _Live, tokens: int, seen: float) -> None:
        new = min(tokens, live.answer - live.tokens)
        live.tokens += new
        live.read += new
        self.totals[m.GENERATED] += new
        if live.arrivals and seen - live.arrivals[-1][0] < 0.001:
            live.arrivals[-1] = (live.arrivals[-1][0], live.tokens)
        else:
            live.arrivals.append((seen, live.tokens))

    def _answer_elsewhere(self, live: _Live) -> None:
        first = live.due + DEEP_TTFT * self._luck()
        live.arrivals = [(first + DEEP_ITL * token, 1 + token) for token in range(live.answer)]
        self._record(live, live.arrivals[-1][0], left=False)

    def _finish(self, live: _Live, seen: float) -> bool:
        left = live.leave is not None and live.tokens >= live.leave
        if not left and live.tokens < live.answer:
            return False
        self._record(live, seen, left)
        return True

    def _record(self, live: _Live, seen: float, left: bool) -> None:
        escalates = any(event.cause == ESCALATION for event in self.events)
        self.ended.append(
            RecordedRequest(
                id=f"{len(self.ended)}",
                server=SERVER,
                kind=live.kind,
                route="completions",
                due=live.due,
                sent=self._seen(live.due),
                arrivals=live.arrivals,
                ended=seen,
                prompt_tokens=live.prompt,
                left=left,
                answered_by=("deep" if live.deep else "fast") if escalates else "",
            )
        )

    def _seen(self, at: float) -> float:
        """When a load generator that sleeps during disturbances of the client notices."""
        return next((e.ended for e in self.events if e.cause == causes.CLIENT and e.began <= at < e.ended), at)

    def _luck(self) -> float:
        half = self.engine.noise / math.sqrt(2)
        self.drift = 0.98 * self.drift + math.sqrt(1 - 0.98**2) * half * self.random.standard_normal()
        luck = math.exp(self.drift + half * self.random.standard_normal())
        if self.random.random() < self.engine.hiccups * self.engine.step:
            luck *= 1 + self.random.exponential(1.0)
        return luck

    def _in(self, cause: str, at: float) -> bool:
        return any(event.cause == cause and event.began <= at < event.ended for event in self.events)

    def _sample(self, at: float) -> MetricsSample:
        used = sum(live.kv for live in self.running) / self.engine.kv_tokens
        gauges = {m.RUNNING: float(len(self.running)), m.WAITING: float(len(self.waiting)), m.KV_USAGE: min(1.0, used)}
        hot = self._in(host_causes.GPU, at)
        device = {host.CORES: CORES, host.GPU_CLOCK: 1800 / (self.slower if hot else 1), host.GPU_SLOWED: float(hot)}
        return MetricsSample(SERVER, at, 0.004, {**gauges, **self.totals, **self.host, **device})

    def _client(self, at: float) -> GeneratorSample:
        late = max(
            (e.ended - e.began for e in self.events if e.cause == causes.CLIENT and e.ended <= at < e.ended + 0.5),
            default=0.002,
        )
        return GeneratorSample(float(at), late, 0.2)
