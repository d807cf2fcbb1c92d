"""Locust users: a placeholder for scenarios, and a base class for users in your own locustfiles."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gevent.event import Event
from locust import User, constant, task

from vllm_instant.tools.measure.token_stream import STREAM_OPTIONS
from vllm_instant_loadtests import locust_stats
from vllm_instant_loadtests.run_recorder import RecordedRequest
from vllm_instant_loadtests.scheduled_request import ScheduledRequest
from vllm_instant_loadtests.streams import StreamingClient


class ScenarioUser(User):  # type: ignore[misc]
    """Waits while the scenario runs. The scenario decides what is sent when, not the number of users."""

    wait_time = constant(1)

    @task  # type: ignore[untyped-decorator]
    def wait_for_the_end(self) -> None:
        """Wait until the test is stopped."""
        Event().wait()


class StreamingUser(User):  # type: ignore[misc]
    """A user that waits for each answer, for your own locustfiles: ``self.chat(…)``, ``self.complete(…)``.

    Set ``host``, and ``model`` to the model name in requests. Answers are streamed and measured by token; TTFT, ITL,
    longest stall and tokens per second are rows of Locust's statistics, in addition to the end-to-end latency.
    """

    abstract = True
    model = ""
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.client = StreamingClient(self.host or "http://127.0.0.1:8000", self.model, self.headers)
        self._numbers = itertools.count()

    def chat(self, messages: list[dict[str, str]] | str, name: str = "chat", **body: Any) -> RecordedRequest:
        """Send a request to ``/v1/chat/completions``; further parameters go into its body."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self._ask("chat", name, {"messages": turns, **body})

    def complete(self, prompt: str, name: str = "completion", **body: Any) -> RecordedRequest:
        """Send a request to ``/v1/completions``."""
        return self._ask("completions", name, {"prompt": prompt, **body})

    def type(
        self, text: str, name: str = "typist", characters_per_second: float = 40.0, **body: Any
    ) -> RecordedRequest:
        """Type a prompt into a session of ``/v1/instant/sessions``; latencies count from its commit."""
        turns = [{"role": "user", "content": text}]
        return self._ask("typist", name, {"messages": turns, **body}, characters_per_second)

    def _ask(self, route: str, name: str, body: dict[str, Any], speed: float | None = None) -> RecordedRequest:
        body = {"stream": True, "stream_options": STREAM_OPTIONS, **body}
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
