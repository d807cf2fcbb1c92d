"""Sends the requests of a segment when they are due, each in a greenlet of its own, and records what came of them.

A user of Locust's sends its next request when the last is answered, so a slow server is asked less (coordinated
omission). Here nothing waits for the server: latencies count from when a request was due.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gevent
from gevent.event import Event
from gevent.pool import Group

from vllm_instant.tools.measure.token_stream import StreamedAnswer
from vllm_instant_loadtests.run_recorder import GeneratorSample, RecordedRequest
from vllm_instant_loadtests.schedule import ScheduledRequest
from vllm_instant_loadtests.streams import CutOffError, StreamingClient

TIMER_SECONDS = 0.05
READING_SECONDS = 0.5


@dataclass(frozen=True)
class SegmentTask:
    """What one process plays of a segment; only JSON types inside, since it may come from another machine."""

    segment: int
    servers: dict[str, dict[str, Any]]
    """``url``, ``model`` and ``headers`` by name; every server gets every request."""
    epoch: float
    """Second 0 of the run, by ``time.time``."""
    begins: float
    """Second of the run at which the segment begins."""
    offset: float
    """Second of the timeline that is played then."""
    seconds: float
    drain_seconds: float
    requests: list[dict[str, Any]] = field(default_factory=list)


class LoadDriver:
    """Plays parts; one a process.

    Args:
        record: is handed every record.
        report: is handed every finished request, for Locust's statistics.
        process: which of several load generators this is.

    """

    def __init__(
        self,
        record: Callable[[RecordedRequest | GeneratorSample], None],
        report: Callable[[RecordedRequest], None],
        process: int = 0,
    ) -> None:
        self._record, self._report, self._process = record, report, process
        self._clients: dict[str, StreamingClient] = {}
        self._group = Group()
        self._stopped = Event()
        self._clock = 0.0

    def play(self, part: SegmentTask) -> None:
        """Send all requests of a part and wait until they are answered, cut off, or the player is stopped."""
        self._stopped.clear()
        self._clock = _second_zero(part.epoch)
        clients = self._clients_of(part.servers)
        watch = gevent.spawn(self._watch_itself)
        try:
            for due in (ScheduledRequest(**plain) for plain in part.requests):
                if self._wait_until(part.begins + due.at - part.offset):
                    return
                for server, client in clients.items():
                    self._group.spawn(self._follow, server, client, due, part)
            if self._wait_until(part.begins + part.seconds):
                return
            self._group.join(timeout=part.drain_seconds)
            self._group.kill(
                CutOffError(f"cut off: not answered {part.drain_seconds:g} s after the end of its segment"), block=True
            )
        finally:
            watch.kill()

    def stop(self) -> None:
        """Hang up on everything that is under way."""
        self._stopped.set()
        self._group.kill(block=True)

    def ask(self, server: Mapping[str, Any], due: ScheduledRequest) -> StreamedAnswer:
        """One request that is not recorded."""
        client = StreamingClient(**server)
        try:
            return client.ask(due)
        finally:
            client.close()

    def _follow(self, server: str, client: StreamingClient, due: ScheduledRequest, part: SegmentTask) -> None:
        when = part.begins + due.at - part.offset + due.typing_seconds
        answer = client.ask(due, wait=lambda: self._sleep_until(when))
        request = RecordedRequest(
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
            segment=part.segment,
            number=due.number,
        )
        self._record(request)
        self._report(request)

    def _clients_of(self, servers: Mapping[str, Mapping[str, Any]]) -> dict[str, StreamingClient]:
        for name, server in servers.items():
            if name not in self._clients:
                self._clients[name] = StreamingClient(**server)
        return {name: self._clients[name] for name in servers}

    def _now(self) -> float:
        return time.perf_counter() - self._clock

    def _sleep_until(self, second: float) -> None:
        gevent.sleep(max(0.0, second - self._now()))

    def _wait_until(self, second: float) -> bool:
        """Whether the player was stopped meanwhile."""
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
    """The requests dealt out in turn, so that every process gets some of each moment."""
    return [[due.plain() for due in requests[number::processes]] for number in range(processes)]


def _second_zero(epoch: float) -> float:
    """``time.perf_counter`` at second 0 of the run."""
    return time.perf_counter() - (time.time() - epoch)
