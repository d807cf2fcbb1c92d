"""Locust users: one that stands for a scenario, and one to build users of your own from."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gevent.event import Event
from locust import User, constant, task

from vllm_instant_loadtests import locust_stats
from vllm_instant_loadtests.run_recorder import RecordedRequest
from vllm_instant_loadtests.schedule import COUNTED, ScheduledRequest
from vllm_instant_loadtests.streams import StreamingClient


class ScenarioUser(User):  # type: ignore[misc]
    """Waits while the scenario plays. What is sent when is the scenario's business, not the number of users'."""

    wait_time = constant(1)

    @task  # type: ignore[untyped-decorator]
    def wait_for_the_end(self) -> None:
        """Do nothing until the test is stopped."""
        Event().wait()


class StreamingUser(User):  # type: ignore[misc]
    """A user who waits for each answer, for locustfiles of your own: ``self.chat(…)``, ``self.complete(…)``.

    Set ``host``, and ``model`` as requests call it. Answers are streamed and measured by token; TTFT, ITL, longest
    stall and tokens a second appear beside the end-to-end latency in Locust's statistics.
    """

    abstract = True
    model = ""
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.client = StreamingClient(self.host or "http://127.0.0.1:8000", self.model, self.headers)
        self._numbers = itertools.count()

    def chat(self, messages: list[dict[str, str]] | str, name: str = "chat", **body: Any) -> RecordedRequest:
        """Ask ``/v1/chat/completions``; further parameters go into the request's body."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self._ask("chat", name, {"messages": turns, **body})

    def complete(self, prompt: str, name: str = "completion", **body: Any) -> RecordedRequest:
        """Ask ``/v1/completions``."""
        return self._ask("completions", name, {"prompt": prompt, **body})

    def type(
        self, text: str, name: str = "typist", characters_per_second: float = 40.0, **body: Any
    ) -> RecordedRequest:
        """Type a prompt into a session of ``/v1/instant/sessions``; latencies count from its commit."""
        turns = [{"role": "user", "content": text}]
        return self._ask("typist", name, {"messages": turns, **body}, characters_per_second)

    def _ask(self, route: str, name: str, body: dict[str, Any], speed: float | None = None) -> RecordedRequest:
        body = {"stream": True, "stream_options": COUNTED, **body}
        due = ScheduledRequest(next(self._numbers), 0.0, name, route, body, None, speed)
        began = time.perf_counter()
        answer = self.client.ask(due)
        request = RecordedRequest(
            id=answer.id,
            server="",
            kind=name,
            route=route,
            due=began if speed is None else answer.sent,
            sent=answer.sent,
            arrivals=answer.arrivals,
            ended=answer.ended,
            prompt_tokens=answer.prompt_tokens,
            error=answer.error,
            left=answer.left,
        )
        locust_stats.report(self.environment, request)
        return request
