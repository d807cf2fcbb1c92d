"""Sends the requests of a segment when they are due, each in a greenlet of its own, and records their answers.

A Locust user sends its next request when the last one is answered, so that a slow server gets less load (coordinated
omission). Here nothing waits for the server: latencies count from when a request was due.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gevent
from gevent.event import Event
from gevent.pool import Group

from vllm_instant.tools.measure.token_stream import StreamedAnswer
from vllm_instant_loadtests.run_recorder import GeneratorSample, RecordedRequest
from vllm_instant_loadtests.scheduled_request import ScheduledRequest
from vllm_instant_loadtests.session_progress import SessionProgress
from vllm_instant_loadtests.streams import CutOffError, StreamingClient

TIMER_SECONDS = 0.05
READING_SECONDS = 0.5


@dataclass(frozen=True)
class SegmentTask:
    """The part of a segment that one process sends; JSON types only, since it may come from another machine."""

    segment: int
    servers: dict[str, dict[str, Any]]
    """``url`` and ``model`` by name; every server gets every request. A key is not sent: each process has its own."""
    epoch: float
    """Second 0 of the run, by ``time.time``."""
    begins: float
    """Second of the run at which the segment begins."""
    offset: float
    """Second of the scenario's timeline at that time."""
    seconds: float
    drain_seconds: float
    requests: list[dict[str, Any]] = field(default_factory=list)


class LoadDriver:
    """Sends segment tasks; one driver per process.

    Args:
        record: called with every record.
        report: called with every finished request, for Locust's statistics.
        process: number of this process among several load generators.
        headers: for all requests.

    """

    def __init__(
        self,
        record: Callable[[RecordedRequest | GeneratorSample], None],
        report: Callable[[RecordedRequest], None],
        process: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._record, self._report, self._process = record, report, process
        self._headers = dict(headers or {})
        self._clients: dict[str, StreamingClient] = {}
        self._group = Group()
        self._stopped = Event()
        self._clock = 0.0
        self._open: dict[int, tuple[float, StreamedAnswer]] = {}

    def run(self, task: SegmentTask) -> None:
        """Send all requests of a task and wait until they are answered or cut off, or the driver is stopped."""
        self._stopped.clear()
        self._clock = _second_zero(task.epoch)
        clients = self._clients_of(task.servers)
        requests = [ScheduledRequest(**plain) for plain in task.requests]
        sessions = {server: SessionProgress(requests) for server in clients}
        watch = gevent.spawn(self._watch_itself)
        try:
            for due in requests:
                if due.after:
                    continue  # sent when the answers that it waits for are there
                if self._wait_until(task.begins + due.at - task.offset):
                    return
                when = task.begins + due.at - task.offset + due.typing_seconds
                for server in clients:
                    self._group.spawn(self._follow, server, due, when, task, sessions[server])
            if self._wait_until(task.begins + task.seconds):
                return
            self._group.join(timeout=task.drain_seconds)
            self._group.kill(
                CutOffError(f"cut off: not answered {task.drain_seconds:g} s after the end of its segment"), block=True
            )
        finally:
            watch.kill()

    def stop(self) -> None:
        """Hang up on all requests in progress."""
        self._stopped.set()
        self._group.kill(block=True)

    def ask(self, server: Mapping[str, Any], due: ScheduledRequest) -> StreamedAnswer:
        """Send one request that is not recorded."""
        client = StreamingClient(**server, headers=self._headers)
        try:
            return client.ask(due)
        finally:
            client.close()

    def late_first_tokens(self, limit: float) -> int:
        """Number of requests in progress that have waited longer than ``limit`` seconds for their first token."""
        now = self._now()
        return sum(not answer.arrivals and now - when > limit for when, answer in self._open.values())

    def _follow(
        self, server: str, due: ScheduledRequest, when: float, task: SegmentTask, sessions: SessionProgress
    ) -> None:
        """Send a request that is due at second ``when``, record its answer, and begin the turns that wait for it."""
        client, answer = self._clients[server], StreamedAnswer()
        self._open[id(answer)] = when, answer
        try:
            client.ask(
                replace(due, body=sessions.body(due)),
                wait=lambda: self._sleep_until(when),
                answer=answer,
                keep_text=sessions.keeps_text(due.number),
            )
        finally:
            del self._open[id(answer)]
        request = self._recorded(server, due, when, answer, task.segment)
        self._record(request)
        self._report(request)
        if request.error is None and not request.left:
            for turn, second in sessions.complete(due.number, request.ended, answer.text):
                if second < task.begins + task.seconds:  # later ones are not sent: their segment has ended
                    self._group.spawn(self._follow_later, server, turn, second, task, sessions)

    def _follow_later(
        self, server: str, turn: ScheduledRequest, second: float, task: SegmentTask, sessions: SessionProgress
    ) -> None:
        if not self._wait_until(second):
            self._follow(server, turn, second + turn.typing_seconds, task, sessions)

    def _recorded(
        self, server: str, due: ScheduledRequest, when: float, answer: StreamedAnswer, segment: int
    ) -> RecordedRequest:
        return RecordedRequest(
            id=answer.id,
            server=server,
            kind=due.kind,
            route=due.route,
            due=round(when, 6),
            sent=round(answer.sent - self._clock, 6),
            arrivals=[(at - self._clock, tokens) for at, tokens in answer.arrivals],
            ended=round(answer.ended - self._clock, 6),
            prompt_tokens=answer.prompt_tokens,
            error=answer.error,
            left=answer.left,
            segment=segment,
            number=due.number,
            session=due.session,
            turn=due.turn,
            accepted=answer.accepted,
            answer_at=None if answer.answer_at is None else round(answer.answer_at - self._clock, 6),
            thinking_tokens=answer.thinking_tokens,
            answered_by=answer.answered_by,
        )

    def _clients_of(self, servers: Mapping[str, Mapping[str, Any]]) -> dict[str, StreamingClient]:
        for name, server in servers.items():
            if name not in self._clients:
                self._clients[name] = StreamingClient(**server, headers=self._headers)
        return {name: self._clients[name] for name in servers}

    def _now(self) -> float:
        return time.perf_counter() - self._clock

    def _sleep_until(self, second: float) -> None:
        gevent.sleep(max(0.0, second - self._now()))

    def _wait_until(self, second: float) -> bool:
        """Whether the driver was stopped meanwhile."""
        return bool(self._stopped.wait(max(0.0, second - self._now())))

    def _watch_itself(self) -> None:
        worst, read_at, used = 0.0, self._now(), time.process_time()
        while True:
            due = self._now() + TIMER_SECONDS
            gevent.sleep(TIMER_SECONDS)
            now = self._now()
            worst = max(worst, now - due)
            if now - read_at >= READING_SECONDS:
                cpu = time.process_time()
                self._record(
                    GeneratorSample(
                        round(now, 4), round(worst, 5), round((cpu - used) / (now - read_at), 4), self._process
                    )
                )
                worst, read_at, used = 0.0, now, cpu


def split_requests(requests: Sequence[ScheduledRequest], processes: int) -> list[list[dict[str, Any]]]:
    """The requests of each process, round-robin, so that all processes are equally loaded at all times.

    The turns of a session stay together: a turn waits for answers, which its own process has.
    """
    shares: list[list[dict[str, Any]]] = [[] for _ in range(processes)]
    owners: dict[int, int] = {}
    turn = 0
    for due in requests:
        owner = owners.get(due.session, -1) if due.session is not None else -1
        if owner < 0:
            owner, turn = turn % processes, turn + 1
            if due.session is not None:
                owners[due.session] = owner
        shares[owner].append(due.plain())
    return shares


def _second_zero(epoch: float) -> float:
    """``time.perf_counter`` at second 0 of the run."""
    return time.perf_counter() - (time.time() - epoch)
