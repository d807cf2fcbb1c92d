"""An endless supply of a scenario's sessions, for users of a closed loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_instant.tools.measure.server_info import ServerInfo, authorization, read_server_info
from vllm_instant_loadtests.scenario import Scenario, ScenarioError, load
from vllm_instant_loadtests.schedule import scheduled_requests
from vllm_instant_loadtests.scheduled_request import ScheduledRequest


class SessionSource:
    """Sessions in the order of the scenario's arrivals, whose times are ignored; single requests are sessions of one.

    Args:
        scenario: with the traffic.
        seed: of prompts; each process of a distributed run has one of its own.
        url: of the server.

    """

    def __init__(self, scenario: Scenario, seed: str, url: str) -> None:
        self.url = url
        self._sessions = _sessions(scenario, seed)

    @cached_property
    def server(self) -> ServerInfo:
        """The server; asked once per process, not by every user."""
        return read_server_info(self.url, authorization(None))

    def take(self) -> list[ScheduledRequest]:
        """The requests of the next session; raises ScenarioError where the scenario has none."""
        return next(self._sessions)


def source_of(environment: Any) -> SessionSource:
    """The source of a Locust process, made when its first user needs it.

    The master sends its options to the workers: the scenario, which has to be a built-in one or a file that the worker
    has, too, and ``loadtest_url``, which is set there and not the page's host.
    """
    source = getattr(environment, "loadtest_sessions", None)
    options = environment.parsed_options
    key = (options.scenario, options.loadtest_url, options.seed)
    if source is None or environment.loadtest_sessions_key != key:
        process = max(0, getattr(environment.runner, "worker_index", 0))
        source = SessionSource(load(Path(options.scenario)), f"{options.seed}/process {process}", options.loadtest_url)
        environment.loadtest_sessions, environment.loadtest_sessions_key = source, key
    found: SessionSource = source
    return found


def _sessions(scenario: Scenario, seed: str) -> Iterator[list[ScheduledRequest]]:
    for part in itertools.count():
        requests = scheduled_requests(scenario, f"{seed}/part {part}")
        if not requests:
            raise ScenarioError(f"{scenario.name} sends no request: raise its rate or duration")
        for _, group in itertools.groupby(requests, key=lambda one: one.number if one.session is None else one.session):
            yield list(group)
