"""Records the requests of a closed loop's users, which Locust's ``request`` event carries, on the clock of the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm_instant_loadtests.run_recorder import RecordedRequest

USERS = "users"
"""Stands for the server in what workers send: the master knows its name."""


class UserRecorder:
    """Listens to Locust's ``request`` event in one process.

    Args:
        record: called with each request, whose times are seconds of ``time.time``.

    """

    def __init__(self, record: Callable[[RecordedRequest], None]) -> None:
        self._record = record

    def hear(self, context: Any = None, **_: Any) -> None:
        """A request has ended; only users' requests are without the name of a server."""
        request = context.get("loadtest") if isinstance(context, dict) else None
        if isinstance(request, RecordedRequest) and not request.server:
            self._record(moved(request, time.time() - time.perf_counter(), USERS))


def moved(request: RecordedRequest, seconds: float, server: str) -> RecordedRequest:
    """The request with later times, of a named server."""
    return replace(
        request,
        server=server,
        due=round(request.due + seconds, 6),
        sent=round(request.sent + seconds, 6),
        ended=round(request.ended + seconds, 6),
        arrivals=[(when + seconds, tokens) for when, tokens in request.arrivals],
        answer_at=None if request.answer_at is None else round(request.answer_at + seconds, 6),
    )
