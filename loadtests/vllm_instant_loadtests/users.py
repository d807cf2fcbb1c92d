"""Locust users: a placeholder for scenarios, users that hold sessions, and a base class for your own locustfiles."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import gevent
from gevent.event import Event
from gevent.pool import Group
from locust import User, constant, task

from vllm_instant.tools.measure.server_info import authorization
from vllm_instant.tools.measure.token_stream import STREAM_OPTIONS
from vllm_instant_loadtests import locust_stats
from vllm_instant_loadtests.run_recorder import RecordedRequest
from vllm_instant_loadtests.scheduled_request import ScheduledRequest
from vllm_instant_loadtests.session_progress import SessionProgress
from vllm_instant_loadtests.session_source import source_of
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
        return self.send(due, time.perf_counter())[0]

    def send(self, due: ScheduledRequest, began: float, keep_text: bool = False) -> tuple[RecordedRequest, str]:
        """Send a planned request and report it; returns it with its answer's text, where that is kept.

        Args:
            due: the request.
            began: when it was due, by ``time.perf_counter``; a typist's latencies count from its commit.
            keep_text: whether the answer is quoted later.

        """
        answer = self.client.ask(due, keep_text=keep_text)
        request = RecordedRequest(
            id=answer.id,
            server="",
            kind=due.kind,
            route=due.route,
            due=began if due.characters_per_second is None else answer.sent,
            sent=answer.sent,
            arrivals=answer.arrivals,
            ended=answer.ended,
            prompt_tokens=answer.prompt_tokens,
            error=answer.error,
            left=answer.left,
            segment=0,
            session=due.session,
            turn=due.turn,
            accepted=answer.accepted,
            answer_at=answer.answer_at,
            thinking_tokens=answer.thinking_tokens,
            answered_by=answer.answered_by,
        )
        locust_stats.report(self.environment, request)
        return request, answer.text


class SessionUser(StreamingUser):
    """A user that holds one session of the scenario after the other (``--closed-loop``).

    The number of users and their spawn rate are Locust's. A closed loop sends less to a slow server, which hides how
    long users of an open system would have waited: use it to see what a fixed number of users gets.
    """

    wait_time = constant(0)

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self._source = source_of(environment)
        # Not the page's host: requests carry the API key of this process.
        found = self._source.server
        self.client = StreamingClient(found.url, found.name, authorization(None))

    @task  # type: ignore[untyped-decorator]
    def hold_session(self) -> None:
        """Send the requests of one session, each when the answers that it waits for are there and its pause is over."""
        requests = self._source.take()
        progress, group = SessionProgress(requests), Group()

        def follow(due: ScheduledRequest, second: float) -> None:
            gevent.sleep(max(0.0, second - time.perf_counter()))
            whole = replace(due, body=progress.body(due))
            request, text = self.send(whole, max(second, began), progress.keeps_text(due.number))
            if request.error is None:
                for turn, at in progress.complete(due.number, request.ended, text):
                    group.spawn(follow, turn, at)

        began = time.perf_counter()
        try:
            for due in requests:
                if not due.after:
                    group.spawn(follow, due, began + due.typing_seconds)
            group.join()
        finally:
            group.kill(block=False)
