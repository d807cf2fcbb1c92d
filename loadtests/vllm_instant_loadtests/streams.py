"""Streamed answers under gevent, for thousands of streams in one process.

Tokens are counted by ``TokenStream``, as by every other client of this project. The transport is geventhttpclient's
(sockets, pools and an HTTP parser in C, which also serve Locust's FastHttpUser): httpx parses HTTP in Python and
uses about ten times the CPU time per event where events arrive back to back, and a busy load generator delays the
arrivals that it measures.

Nothing is monkey-patched here: Locust does that, and only in its own process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import gevent
from geventhttpclient.connectionpool import ConnectionPool, SSLConnectionPool
from geventhttpclient.response import HTTPParseError, HTTPResponse

from vllm_instant.escalation.requests import ANSWERED_BY
from vllm_instant.tools.measure.token_stream import StreamedAnswer, StreamError, TokenStream
from vllm_instant_loadtests.scheduled_request import ScheduledRequest

TIMEOUT_SECONDS = 600.0
"""Time without data after which an answer counts as failed."""
CLOSING_SECONDS = 5.0
"""Time limit for ending a typist's session; the server ends idle sessions itself."""
RECEIVE_BYTES = 1 << 16
MAX_CONNECTIONS = 1 << 16
TYPING_SECONDS_PER_EVENT = 0.25
"""Duration of the typing that goes into one event of a typist."""


class CutOffError(Exception):
    """Raised inside of a request that takes too long."""


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
            host, port, host, port, size=MAX_CONNECTIONS, connection_timeout=30.0, network_timeout=TIMEOUT_SECONDS
        )
        self._path = parts.path.rstrip("/")
        self._model = model
        given = {"Host": parts.netloc, "Content-Type": "application/json", "Accept": "*/*", **(headers or {})}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in given.items())

    def ask(
        self,
        due: ScheduledRequest,
        wait: Callable[[], None] = lambda: None,
        answer: StreamedAnswer | None = None,
        keep_text: bool = False,
    ) -> StreamedAnswer:
        """Send a request and follow its answer to the end; failures are noted in the answer, not raised.

        Args:
            due: the request.
            wait: for typists: called when everything is typed, returns when the prompt is to be committed.
            answer: is filled meanwhile; a new one by default.
            keep_text: whether the answer's text is kept, for a later turn of its session; its events are then parsed.

        """
        answer = StreamedAnswer() if answer is None else answer
        body = {"model": self._model, **due.body}
        try:
            if due.route == "typist":
                self._typed(body, due, answer, wait, keep_text)
            else:
                path = "/v1/completions" if due.route == "completions" else "/v1/chat/completions"
                self._follow(path, body, answer, due.leave_after, keep_text)
        except gevent.GreenletExit:
            answer.left = True
        except (StreamError, CutOffError, HTTPParseError, OSError) as error:
            answer.error = str(error) if isinstance(error, StreamError | CutOffError) else _what(error)
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
        self,
        body: dict[str, Any],
        due: ScheduledRequest,
        answer: StreamedAnswer,
        wait: Callable[[], None],
        keep_text: bool,
    ) -> None:
        """Type the last message's text, then commit it and follow the answer."""
        *before, last = body["messages"]
        opened = self._exchange("POST", "/v1/instant/sessions", body | {"messages": before})
        try:
            path = f"/v1/instant/sessions/{opened['id']}"
        except (KeyError, TypeError):
            raise StreamError("the server opened no session") from None
        try:
            text, speed = last["content"], due.characters_per_second or 40.0
            piece = max(1, round(speed * TYPING_SECONDS_PER_EVENT))
            began = time.perf_counter()
            for start in range(0, len(text), piece):
                self._exchange("POST", path, {"type": "input_text.append", "text": text[start : start + piece]})
                gevent.sleep(max(0.0, began + min(start + piece, len(text)) / speed - time.perf_counter()))
            wait()
            self._follow(path, {"type": "input_text.commit"}, answer, due.leave_after, keep_text)
            answer.ended = time.perf_counter()
        finally:
            with gevent.Timeout(CLOSING_SECONDS, False), suppress(StreamError, HTTPParseError, OSError):
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

    def _follow(
        self, path: str, body: Any, answer: StreamedAnswer, leave_after: int | None, keep_text: bool = False
    ) -> None:
        answer.sent = time.perf_counter()
        sock, response = self._send("POST", path, body)
        stream = TokenStream(answer, (lambda text: None) if keep_text else None)
        try:
            while True:
                tokens = self._take(response, stream)
                if leave_after is not None and tokens >= leave_after:
                    answer.left = True
                    return
                if response.message_complete:
                    break
                self._read(sock, response)
            self._check(response)
            answer.answered_by = response.get(ANSWERED_BY, "")
            stream.end()
        finally:
            self._release(sock, response)

    def _take(self, response: _Stream, stream: TokenStream) -> int:
        """Hand over what has arrived of the body; returns the number of tokens so far."""
        if not response.headers_complete or response.status_code != 200 or not response.body:
            return stream.answer.tokens
        now, data = time.perf_counter(), response.body
        response.body = bytearray()
        return stream.feed(data, now)

    def _send(self, method: str, path: str, body: Any) -> tuple[Any, _Stream]:
        """Send a request and wait for the first bytes of its answer."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(data)}\r\n\r\n"
        for _ in range(2):
            sock = self._pool.get_socket()
            response = _Stream()
            try:
                sock.sendall(head.encode() + data)
                first = sock.recv(RECEIVE_BYTES)
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
        raise StreamError("the server closes the connection")

    def _read(self, sock: Any, response: _Stream) -> None:
        data = sock.recv(RECEIVE_BYTES)
        if not data:
            raise StreamError("the connection broke off")
        response.feed(data)

    def _check(self, response: _Stream) -> None:
        if response.status_code >= 300:
            text = bytes(response.body[:300]).decode(errors="replace")
            raise StreamError(f"HTTP {response.status_code}: {text}")

    def _release(self, sock: Any, response: _Stream) -> None:
        if response.should_close():
            self._pool.release_socket(sock)
        else:
            self._pool.return_socket(sock)


def _what(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
