"""Makes the probes of a capacity search inside of Locust's process, and records them as segments of one run."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import gevent
import httpx

from vllm_instant.tools.measure import server_metrics as m
from vllm_instant.tools.measure.http_client import get
from vllm_instant.tools.measure.servers import SETTLE_SECONDS
from vllm_instant_loadtests import schedule
from vllm_instant_loadtests.capacity import WARM_UP_SHARE, CapacityPlan, search_capacity, searches_of
from vllm_instant_loadtests.capacity_goals import (
    ProbeResult,
    clearly_too_fast,
    count_probe,
    first_token_limit,
)
from vllm_instant_loadtests.run_options import RunOptions
from vllm_instant_loadtests.run_recorder import RecordedRequest, RecordedRun, RunRecorder
from vllm_instant_loadtests.schedule import Segment
from vllm_instant_loadtests.scheduled_request import ScheduledRequest

logger = logging.getLogger("loadtest")
LOOK_SECONDS = 0.5
"""Time between two looks at a running probe."""
DRAIN_SECONDS = 60.0
"""Maximum time for a server to become idle before its next probe."""

RunSegment = Callable[[Segment, list[ScheduledRequest]], list[dict[str, Any]]]
"""Sends the requests of a segment and describes it."""


def unfinished_run(options: RunOptions, plan: CapacityPlan) -> RecordedRun | None:
    """The interrupted search in the output folder; None without one.

    Raises:
        FileExistsError: where the folder has another run.

    """
    file = options.output / "run.json"
    if not file.exists():
        return None
    known = json.loads(file.read_text())
    searched = CapacityPlan(**known["capacity"]) if "capacity" in known else None
    if searched != plan or known["scenario"]["name"] != options.scenario.name or known["seed"] != options.seed:
        raise FileExistsError(f"{options.output} has a run with another setup: choose another --output")
    names = [server["name"] for server in known["servers"]]
    if names != list(options.servers):
        raise FileExistsError(f"{options.output} has a run of {', '.join(names)}: give the same servers, in this order")
    return RecordedRun.read(options.output)


class CapacityRunner:
    """The probes of one search.

    Args:
        plan: of the search.
        options: of the run.
        about: description of the run, with the segments so far; it is extended.
        targets: ``url`` and ``model`` of each server.
        run_segment: sends requests.
        stop_segment: ends the segment that runs.
        late_first_tokens: number of requests in progress without a first token after some seconds.
        stopped: whether the user has stopped the run.

    """

    def __init__(
        self,
        plan: CapacityPlan,
        options: RunOptions,
        about: dict[str, Any],
        targets: Mapping[str, Mapping[str, Any]],
        *,
        run_segment: RunSegment,
        stop_segment: Callable[[], None],
        late_first_tokens: Callable[[float], int],
        stopped: Callable[[], bool],
    ) -> None:
        self._plan, self._options, self._about, self._targets = plan, options, about, targets
        self._run_segment, self._stop_segment = run_segment, stop_segment
        self._late, self._stopped = late_first_tokens, stopped
        self._heard: list[RecordedRequest] = []
        self._goals = plan.share_goals

    def hear(self, request: RecordedRequest) -> None:
        """A request of the current probe has ended."""
        self._heard.append(request)

    def run(self, before: RecordedRun | None, recorder: RunRecorder) -> bool:
        """Search; returns whether every server's search has ended."""
        start = float(self._about["start_rate"])
        known = before or RecordedRun({**self._about, "segments": []})
        searches = searches_of(known, self._plan, start)
        until = time.monotonic() + self._options.max_seconds if self._options.max_seconds else float("inf")

        def probe(server: str, rate: float, number: int) -> ProbeResult | None:
            found = self._probe(server, rate, number)
            recorder.update(self._about)
            return found

        return search_capacity(
            self._plan,
            searches,
            probe,
            seed=self._options.seed,
            out_of_time=lambda: time.monotonic() > until or self._stopped(),
        )

    def _probe(self, server: str, rate: float, number: int) -> ProbeResult | None:
        self._drain(str(self._targets[server]["url"]))
        if self._stopped():
            return None
        counting = self._plan.seconds_at(rate)
        seconds = counting * (1 + WARM_UP_SHARE)
        scale = rate / float(self._about["start_rate"])
        scenario = self._options.scenario.scaled(scale, seconds)
        due = schedule.scheduled_requests(scenario, f"{self._options.seed}/probe {number}")
        self._heard.clear()
        looking = gevent.spawn(self._look, len(due))
        try:
            described = self._run_segment(Segment(number, (server,), 0.0, seconds), due)[0]
        finally:
            stopped = bool(looking.dead and looking.value)
            looking.kill()
        if self._stopped():
            return None
        begins = described["began"]
        end = described["ended"] if stopped else begins + seconds
        measured = (begins + seconds - counting, max(end, begins))
        described |= {"rate": rate, "measured": [round(at, 4) for at in measured], "stopped": stopped}
        self._about["segments"].append(described)
        found = count_probe(self._goals, self._heard, server=server, rate=rate, span=measured, stopped=stopped)
        logger.info(
            "%s: %.3g per second: %s%s",
            server,
            rate,
            ", ".join(f"{name} {good / total:.1%}" for name, (good, total) in found.counts.items()) or "no request",
            ", ended early" if stopped else "",
        )
        return found

    def _look(self, planned: int) -> bool:
        """Watch a probe; ends it, and returns True, when its rate is clearly too high."""
        limit = first_token_limit(self._goals)
        while True:
            gevent.sleep(LOOK_SECONDS)
            if clearly_too_fast(self._goals, self._heard, planned, self._late(limit)):
                gevent.spawn(self._stop_segment)
                return True

    def _drain(self, url: str) -> None:
        """Wait until the server is idle; where it has no such metrics, for the time after which servers are."""
        gevent.sleep(SETTLE_SECONDS)
        ends = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < ends and not self._stopped():
            with suppress(httpx.HTTPError):
                values = m.metric_totals(get(url, "/metrics").text, (m.RUNNING, m.WAITING))
                if values.get(m.RUNNING, 0.0) + values.get(m.WAITING, 0.0) == 0:
                    return
            gevent.sleep(LOOK_SECONDS)
