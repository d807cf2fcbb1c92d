"""Streamed answers under gevent, followed token by token at little cost.

Load generators that look at every event as JSON are busy with a hundred streams. Here whatever the socket has is read
at once, one regular expression finds the last number of tokens in it, and nothing else is looked at. Sockets, pools and
the HTTP parser are geventhttpclient's, which also serves Locust's FastHttpUser.

It uses gevent without patching anything: Locust does that, and only in its own process.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import gevent
from geventhttpclient.connectionpool import ConnectionPool, SSLConnectionPool
from geventhttpclient.response import HTTPParseError, HTTPResponse

from vllm_instant_loadtests.schedule import ScheduledRequest

SECONDS = 600.0
"""After which an answer that has stopped coming is an error."""
CLOSING_SECONDS = 5.0
"""Most that the end of a typist's session may take; the server ends it itself when it has been idle."""
AT_ONCE = 1 << 16
MAX_CONNECTIONS = 1 << 16
SLOWEST_PIECE = 0.25
"""Seconds of typing that go into one event of a typist."""
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d+)')
_ID = re.compile(rb'"id":\s*"([^"]+)"')
_TEXT = re.compile(rb'"(?:content|text)":\s*"(?!")')
_ERROR = re.compile(rb'data: \{"error":\s*(.*)')


class AnswerError(Exception):
    """A request failed; the message says how."""


class CutOffError(Exception):
    """Raised inside of a request that takes too long."""


@dataclass
class StreamOutcome:
    """What came of a request; times by ``time.perf_counter``."""

    sent: float = float("nan")
    ended: float = float("nan")
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """``(when, tokens so far)``; what one read of the socket brought arrived together."""
    id: str = ""
    prompt_tokens: int | None = None
    error: str | None = None
    left: bool = False


class _Stream(HTTPResponse):  # type: ignore[misc]
    """The parser of one answer; collects the body."""

    def __init__(self) -> None:
        super().__init__("POST")
        self.body = bytearray()

    def _on_body(self, buf: bytearray) -> None:
        self.body += buf


class StreamingClient:
    """Sends requests to one server, any number at a time.

    Args:
        url: the server, without ``/v1``.
        model: the name that requests call the model by.
        headers: for all requests.

    """

    def __init__(self, url: str, model: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        host, port = parts.hostname or "", parts.port or (443 if secure else 80)
        pool = SSLConnectionPool if secure else ConnectionPool
        self._pool = pool(
            host, port, host, port, size=MAX_CONNECTIONS, connection_timeout=30.0, network_timeout=SECONDS
        )
        self._path = parts.path.rstrip("/")
        self._model = model
        given = {"Host": parts.netloc, "Content-Type": "application/json", "Accept": "*/*", **(headers or {})}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in given.items())

    def ask(self, due: ScheduledRequest, wait: Callable[[], None] = lambda: None) -> StreamOutcome:
        """Send a request and follow its answer to the end; failures are noted in the answer, not raised.

        Args:
            due: the request.
            wait: for typists: called when everything is typed, returns when the prompt is to be committed.

        """
        answer = StreamOutcome()
        body = {"model": self._model, **due.body}
        try:
            if due.route == "typist":
                self._typed(body, due, answer, wait)
            else:
                path = "/v1/completions" if due.route == "completions" else "/v1/chat/completions"
                self._follow(path, body, answer, due.leave_after)
        except gevent.GreenletExit:
            answer.left = True
        except (AnswerError, CutOffError, HTTPParseError, OSError) as error:
            answer.error = str(error) if isinstance(error, AnswerError | CutOffError) else _what(error)
        now = time.perf_counter()
        if answer.ended != answer.ended:  # closing a typist's session is no part of its answer
            answer.ended = now
        if answer.sent != answer.sent:  # it failed before it was sent
            answer.sent = now
        return answer

    def close(self) -> None:
        """Close idle connections."""
        self._pool.close()

    def _typed(
        self, body: dict[str, Any], due: ScheduledRequest, answer: StreamOutcome, wait: Callable[[], None]
    ) -> None:
        """Type the last message's text, then commit it and follow the answer."""
        *before, last = body["messages"]
        opened = self._exchange("POST", "/v1/instant/sessions", body | {"messages": before})
        try:
            path = f"/v1/instant/sessions/{opened['id']}"
        except (KeyError, TypeError):
            raise AnswerError("the server opened no session") from None
        try:
            text, speed = last["content"], due.characters_per_second or 40.0
            piece = max(1, round(speed * SLOWEST_PIECE))
            began = time.perf_counter()
            for start in range(0, len(text), piece):
                self._exchange("POST", path, {"type": "input_text.append", "text": text[start : start + piece]})
                gevent.sleep(max(0.0, began + min(start + piece, len(text)) / speed - time.perf_counter()))
            wait()
            self._follow(path, {"type": "input_text.commit"}, answer, due.leave_after)
            answer.ended = time.perf_counter()
        finally:
            with gevent.Timeout(CLOSING_SECONDS, False), suppress(AnswerError, HTTPParseError, OSError):
                self._exchange("DELETE", path, None)

    def _exchange(self, method: str, path: str, body: Any) -> Any:
        """One request with a whole answer; None where that is no JSON."""
        sock, response = self._send(method, path, body)
        try:
            while not response.message_complete:
                self._read(sock, response)
            self._check(response)
        finally:
            self._release(sock, response)
        try:
            return json.loads(bytes(response.body))
        except ValueError:
            return None

    def _follow(self, path: str, body: Any, answer: StreamOutcome, leave_after: int | None) -> None:
        answer.sent = time.perf_counter()
        sock, response = self._send("POST", path, body)
        have, finished, counted = 0, False, False
        try:
            while True:
                now = time.perf_counter()
                whole, newline, rest = response.body.rpartition(b"\n")
                if response.headers_complete and response.status_code == 200 and newline:
                    if not answer.id and (found := _ID.search(whole)):
                        answer.id = found[1].decode(errors="replace")
                    if failed := _ERROR.search(whole):
                        raise AnswerError(f"the answer ends with an error: {failed[1][:200].decode(errors='replace')}")
                    counts = _TOKENS.findall(whole)
                    counted = counted or bool(counts)
                    # Where a server does not count, an event with text is taken for one token.
                    total = max(map(int, counts)) if counts else have + (0 if counted else len(_TEXT.findall(whole)))
                    if total > have:
                        have = total
                        answer.arrivals.append((now, total))
                    if answer.prompt_tokens is None and (told := _PROMPT_TOKENS.search(whole)):
                        answer.prompt_tokens = int(told[1])
                    finished = finished or b"[DONE]" in whole
                    response.body = rest
                    if leave_after is not None and have >= leave_after:
                        answer.left = True
                        return
                if response.message_complete:
                    break
                self._read(sock, response)
            self._check(response)
            if not finished:
                raise AnswerError("the answer broke off")
            if not have:
                raise AnswerError("the answer ended without a token")
        finally:
            self._release(sock, response)

    def _send(self, method: str, path: str, body: Any) -> tuple[Any, _Stream]:
        """Send a request and wait for the first bytes of its answer."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(data)}\r\n\r\n"
        for _ in range(2):
            sock = self._pool.get_socket()
            response = _Stream()
            try:
                sock.sendall(head.encode() + data)
                first = sock.recv(AT_ONCE)
                if first:
                    response.feed(first)
                    return sock, response
            except ConnectionError:
                pass
            except BaseException:
                self._pool.release_socket(sock)
                raise
            # The server had closed a connection that lay idle, as servers do after some seconds: nothing was asked yet.
            self._pool.release_socket(sock)
        raise AnswerError("the server closes the connection")

    def _read(self, sock: Any, response: _Stream) -> None:
        data = sock.recv(AT_ONCE)
        if not data:
            raise AnswerError("the connection broke off")
        response.feed(data)

    def _check(self, response: _Stream) -> None:
        if response.status_code >= 300:
            text = bytes(response.body[:300]).decode(errors="replace")
            raise AnswerError(f"HTTP {response.status_code}: {text}")

    def _release(self, sock: Any, response: _Stream) -> None:
        if response.should_close():
            self._pool.release_socket(sock)
        else:
            self._pool.return_socket(sock)


def _what(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
