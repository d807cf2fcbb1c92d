"""The reader of streams, against sockets that send whatever a test wants."""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_instant_loadtests import streams
from vllm_instant_loadtests.scheduled_request import ScheduledRequest
from vllm_instant_loadtests.streams import StreamingClient

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DUE = ScheduledRequest(0, 0.0, "a", "completions", {"prompt": "p"})


@contextmanager
def sending(
    *pieces: bytes | float, to: Mapping[bytes, Sequence[bytes | float]] = MappingProxyType({})
) -> Iterator[StreamingClient]:
    """A client of a server that sends these pieces, and sleeps where one is a number, then closes.

    ``to``: other pieces for requests that begin so.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                request = connection.recv(1 << 16)
                try:
                    for piece in next((to[start] for start in to if request.startswith(start)), pieces):
                        if isinstance(piece, bytes):
                            connection.sendall(piece)
                        else:
                            time.sleep(piece)
                except OSError:
                    return

    threading.Thread(target=serve, daemon=True).start()
    client = StreamingClient(f"http://127.0.0.1:{listener.getsockname()[1]}", "m")
    try:
        yield client
    finally:
        client.close()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def event(tokens: int | None, text: str = "word") -> bytes:
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 7, "completion_tokens": tokens}}
    return f"data: {json.dumps({'id': 'cmpl-1', 'choices': [{'text': text}], **usage})}\n\n".encode()


def chunked(*bodies: bytes, end: bool = True) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(body), body) for body in bodies) + (b"0\r\n\r\n" if end else b"")


DONE = b"data: [DONE]\n\n"


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 300), max_size=12), st.lists(st.integers(1, 400), max_size=5))
def test_however_the_bytes_are_cut_the_tokens_are_the_same(cuts: Sequence[int], chunk_cuts: Sequence[int]) -> None:
    body = b"".join(event(tokens) for tokens in (0, 1, 5, 123, 124)) + DONE
    places = sorted({0, len(body), *(place % len(body) for place in chunk_cuts)})
    whole = HEAD + chunked(*(body[a:b] for a, b in itertools.pairwise(places)))
    ends = sorted({0, len(whole), *(cut % len(whole) for cut in cuts)})
    with sending(*(whole[a:b] for a, b in itertools.pairwise(ends))) as client:
        answer = client.ask(DUE)
    assert answer.error is None
    assert answer.arrivals[-1][1] == 124
    assert [tokens for _, tokens in answer.arrivals] == sorted({tokens for _, tokens in answer.arrivals})
    assert (answer.id, answer.prompt_tokens) == ("cmpl-1", 7)


@pytest.mark.perf
def test_arrivals_have_the_times_at_which_the_server_sent_them() -> None:
    parts = [chunked(event(tokens), end=False) for tokens in (1, 4, 6)]
    with sending(HEAD, 0.05, parts[0], 0.1, parts[1], 0.2, parts[2] + chunked(DONE)) as client:
        answer = client.ask(DUE)
    assert [tokens for _, tokens in answer.arrivals] == [1, 4, 6]
    when = [at - answer.sent for at, _ in answer.arrivals]
    assert when == pytest.approx([0.05, 0.15, 0.35], abs=0.04)


def test_without_counts_an_event_with_text_is_a_token() -> None:
    body = chunked(event(None, ""), event(None), event(None), event(None, ""), DONE)
    with sending(HEAD + body) as client:
        answer = client.ask(DUE)
    assert answer.arrivals[-1][1] == 2


def test_the_end_that_answered_is_known() -> None:
    head = HEAD.replace(b"\r\n\r\n", b"\r\nX-Instant-Answered-By: deep\r\n\r\n")
    for sent, expected in ((head, "deep"), (HEAD, "")):
        with sending(sent + chunked(event(1), DONE)) as client:
            assert client.ask(DUE).answered_by == expected


def test_the_client_hangs_up_after_the_requested_number_of_tokens() -> None:
    with sending(HEAD, chunked(event(1), event(3), end=False), 0.2, chunked(event(9), DONE)) as client:
        answer = client.ask(ScheduledRequest(0, 0.0, "a", "completions", {"prompt": "p"}, leave_after=2))
    assert answer.left
    assert answer.error is None
    assert answer.arrivals[-1][1] == 3


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nbusy"], "HTTP 503: busy"),
        ([HEAD, chunked(event(1), end=False)], "the connection broke off"),
        ([HEAD, chunked(event(1))], "the answer broke off"),
        ([HEAD, chunked(DONE)], "the answer ended without a token"),
        ([HEAD, chunked(event(1), b'data: {"error": {"message": "dead"}}\n\n', DONE)], "ends with an error.*dead"),
        ([], "the server closes the connection"),
        ([b"nonsense\r\n\r\n"], "HTTPParseError"),
    ],
)
def test_every_failure_has_a_message(pieces: Sequence[bytes], message: str) -> None:
    with sending(*pieces) as client:
        answer = client.ask(DUE)
    assert answer.error is not None
    assert re.search(message, answer.error)


def test_an_unreachable_server_is_an_error_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert "Connection refused" in (StreamingClient(url, "m").ask(DUE).error or "")


def test_a_session_that_does_not_end_is_no_part_of_a_typists_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CLOSING_SECONDS", 0.3)
    opened = (HEAD, chunked(b'{"id": "s"}'))
    due = ScheduledRequest(0, 0.0, "a", "typist", {"messages": [{"role": "user", "content": ""}]})
    answer = (HEAD, chunked(event(2), b"data: [DONE]\n\n"))
    with sending(*answer, to={b"POST /v1/instant/sessions ": opened, b"DELETE": (30.0,)}) as client:
        got = client.ask(due)
        after = time.perf_counter() - got.ended
    assert got.error is None
    assert got.arrivals[-1][1] == 2
    assert 0.29 <= after < 10
