"""The sessions of one task on one server: which turns may begin now, and with which messages.

A session is a graph of requests. A request begins when all answers that it waits for are complete, after its pause; a
conversation is a chain, an agent's parallel calls are siblings. Where an answer fails, nothing that waits for it is
sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_instant_loadtests.scheduled_request import ScheduledRequest

ANSWER_OF = "answer_of"
"""Key of a message whose content is the answer to an earlier request of the session, by its number."""


class SessionProgress:
    """Pure bookkeeping, without a clock.

    Args:
        requests: of whole sessions, and requests without a session.

    """

    def __init__(self, requests: Sequence[ScheduledRequest]) -> None:
        self._waiting = {request.number: set(request.after) for request in requests if request.after}
        self._followers: dict[int, list[ScheduledRequest]] = {}
        for request in requests:
            for number in request.after:
                self._followers.setdefault(number, []).append(request)
        self._ended: dict[int, float] = {}
        self._texts: dict[int, str] = {}
        self._quoted = {
            int(message[ANSWER_OF])
            for request in requests
            if request.after
            for message in request.body.get("messages", [])
            if ANSWER_OF in message
        }

    def keeps_text(self, number: int) -> bool:
        """Whether a later turn quotes this request's answer."""
        return number in self._quoted

    def complete(self, number: int, ended: float, text: str) -> list[tuple[ScheduledRequest, float]]:
        """A request was answered; returns the requests that are due by that, each with its second.

        Args:
            number: of the request.
            ended: second of the run at which its answer ended.
            text: of the answer, where it is kept.

        """
        self._ended[number] = ended
        self._texts[number] = text
        ready = []
        for follower in self._followers.get(number, ()):
            waiting = self._waiting[follower.number]
            waiting.discard(number)
            if not waiting:
                ready.append((follower, max(self._ended[n] for n in follower.after) + follower.pause))
        return ready

    def body(self, request: ScheduledRequest) -> dict[str, Any]:
        """The body of a request with the answers that it quotes."""
        if not request.after or "messages" not in request.body:
            return request.body
        messages = [
            {"role": message["role"], "content": self._texts[int(message[ANSWER_OF])]}
            if ANSWER_OF in message
            else message
            for message in request.body["messages"]
        ]
        return {**request.body, "messages": messages}
