"""A draft server may do what it likes: what has arrived is used, and nothing waits."""

import http
import logging
import threading

import numpy as np
import pytest
from draft_servers import HELLO, ServerThread, answering, hello, hostile, wait_until
from websockets.http11 import Response

from vllm_instant import DraftRequest
from vllm_instant.remote import protocol
from vllm_instant.remote.prefixes import BLOCK_TOKENS, block_hashes
from vllm_instant.remote.protocol import Close, Committed, Hello, Missing, Open, Tail
from vllm_instant_plugins.remote import connection as module
from vllm_instant_plugins.remote.connection import DraftServerConnection, ServerAddress, frames_of
from vllm_instant_plugins.remote.drafter import NewTokens, RemoteDrafter

OWN = Hello(protocol.VERSION, "aa", 100)


@pytest.fixture
def connect():
    """Connections that are closed at the end."""
    made = []

    def start(url, hello=OWN, seconds=20.0, **address):
        made.append(DraftServerConnection(ServerAddress(url, min_backoff=0.01, max_backoff=0.02, **address), hello, 4))
        made[-1].reason = made[-1].start(seconds)
        return made[-1]

    yield start
    for one in made:
        one.close()
        assert not one._thread.is_alive()


def counting(known):
    """The answer that counts up."""
    return [known[-1] + step for step in range(1, 20)]


def tokens_of(connection, request_id="a"):
    return [list(branch.tokens) for branch in connection.published.get(request_id, ())]


def test_tokens_go_out_and_drafts_come_in(connect):
    heard = []
    with ServerThread(answering(counting, heard)) as server:
        connection = connect(server.url)
        assert connection.reason is None
        connection.advance([NewTokens("a", "salt", 0, [1, 2])], ())
        wait_until(lambda: tokens_of(connection) == [[3, 4, 5, 6, 7, 8, 9, 10, 11]])
        connection.advance([NewTokens("a", "salt", 2, [3, 4])], ())
        wait_until(lambda: tokens_of(connection)[-1][:2] == [5, 6] and len(heard) == 2)
        connection.advance((), ("a",))
        wait_until(lambda: len(heard) == 3)
        assert connection.published == {}
    [opened, committed, closed] = heard
    assert opened == Open(opened.request, [1, 2], 9, protocol.tenant_of("salt"))
    assert committed == Committed(opened.request, 2, [3, 4], 9)
    assert closed == Close(opened.request)


def test_live_requests_are_opened_anew_after_a_reconnection(connect):
    heard = []
    with ServerThread(answering(counting, heard)) as server:
        connection = connect(server.url)
        connection.advance([NewTokens("a", "", 0, [1, 2]), NewTokens("b", "", 0, [7])], ())
        wait_until(lambda: len(heard) == 2)

        before = heard.copy()
        heard.clear()
        server.lose_connections()
        wait_until(lambda: len(heard) == 2)
        wait_until(lambda: tokens_of(connection) == [[3, 4, 5, 6, 7, 8, 9, 10, 11]])
        connection.advance([NewTokens("a", "", 2, [3])], ("b",))
        wait_until(lambda: len(heard) == 4)
    opened = {tuple(message.tokens): message.request for message in heard[:2]}
    assert opened.keys() == {(1, 2), (7,)}
    # Numbers are not used again: late messages of the old connection are those of no request.
    assert min(opened.values()) > max(message.request for message in before)
    assert heard[2:] == [Committed(opened[1, 2], 2, [3], 9), Close(opened[7,])]
    assert connection.num_connections == 2


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        (Hello(protocol.VERSION, "bb", 100), "the tokenizers differ (fingerprint aa here, bb there)"),
        (Hello(7, "aa", 100), "speaks version 7 of the protocol, this one 1"),
    ],
)
def test_ends_that_do_not_agree_are_one_sentence_at_the_start(connect, own, sentence):
    async def greet(socket):
        await hello(socket, own)
        await socket.wait_closed()

    with ServerThread(greet) as server:
        assert sentence in connect(server.url).reason


def test_another_version_of_the_subprotocol_is_one_sentence(connect):
    with ServerThread(hello, subprotocols=["instant-draft.v9"], select_subprotocol=lambda *_: None) as server:
        assert "does not speak version 1" in connect(server.url).reason


def test_a_wrong_token_is_one_sentence_at_the_start(connect):
    def check(socket, request):
        if request.headers.get("Authorization") != "Bearer right":
            return socket.respond(http.HTTPStatus.UNAUTHORIZED, "")
        return None

    with ServerThread(answering(counting), process_request=check) as server:
        assert connect(server.url, token="wrong").reason == "it refuses the token (HTTP 401)"
        assert connect(server.url, token="right").reason is None


def test_a_server_that_is_not_there_yet_is_found_later(connect, caplog):
    with ServerThread(hello) as reserved:
        url = reserved.url
    with caplog.at_level(logging.WARNING, "vllm.instant"):
        connection = connect(url)
        connection.advance([NewTokens("a", "", 0, [1, 2])], ())
    assert connection.reason is None
    wait_until(lambda: any("gives no drafts" in record.message for record in caplog.records))
    with ServerThread(answering(counting)) as server:
        connection._address.url = server.url
        wait_until(lambda: tokens_of(connection) != [])


def closes(socket):
    return socket.close()


async def says_nothing(socket):
    await socket.wait_closed()


async def no_hello(socket):
    await socket.send(protocol.encode([Tail(0, 0, 1, 1, 1, [1])]))


async def text(socket):
    await hello(socket)
    await socket.send("[]")


async def huge(socket):
    await hello(socket)
    await socket.send(bytes(protocol.MAX_SERVER_FRAME + 1))


async def flood(socket):
    await hello(socket)
    await socket.recv()
    while True:
        await socket.send(protocol.encode([Tail(0, 0, 2, 2, 2, [1])] * 100))


async def useless(socket):
    await hello(socket)
    [opened] = protocol.read_from_engine(await socket.recv())
    await socket.send(protocol.encode([Tail(opened.request, 0, 9, 9, 9, [1])] * (module.MAX_WRONG_MESSAGES + 1)))
    await socket.wait_closed()


@pytest.mark.parametrize("fault", [closes, says_nothing, no_hello, text, huge, flood, useless])
def test_a_server_that_breaks_the_protocol_is_left_and_tried_again(connect, monkeypatch, fault):
    monkeypatch.setattr(module, "TIMEOUT", 0.1)
    with ServerThread(fault) as server:
        connection = connect(server.url)
        connection.advance([NewTokens("a", "", 0, [1, 2])], ())
        wait_until(lambda: server.num_connections > 1)
        server.handler = answering(counting)
        wait_until(lambda: tokens_of(connection) != [])


def test_errors_of_http_are_tried_again(connect):
    broken = [True]

    def check(socket, request):
        return Response(500, "broken", socket.respond(http.HTTPStatus.OK, "").headers) if broken[0] else None

    with ServerThread(answering(counting), process_request=check) as server:
        connection = connect(server.url)
        connection.advance([NewTokens("a", "", 0, [1, 2])], ())
        broken[0] = False
        wait_until(lambda: tokens_of(connection) != [])


def test_declined_requests_have_no_drafts(connect):
    async def decline(socket):
        await hello(socket)
        [opened] = protocol.read_from_engine(await socket.recv())
        await socket.send(protocol.encode([protocol.Declined(opened.request, "too many requests")]))
        frames.append(await socket.recv())

    frames = []
    with ServerThread(decline) as server:
        connection = connect(server.url)
        connection.advance([NewTokens("a", "", 0, [1, 2])], ())
        wait_until(lambda: connection._requests and not connection._requests["a"].open)
        connection.advance([NewTokens("a", "", 2, [3]), NewTokens("b", "", 0, [5])], ())
        wait_until(lambda: frames)
    # Of the declined request the server hears no more.
    assert [type(message) for message in protocol.read_from_engine(frames[0])] == [Open]


def test_a_request_with_more_tokens_than_the_protocol_has_is_closed(connect, monkeypatch):
    heard = []
    with ServerThread(answering(counting, heard)) as server:
        connection = connect(server.url)
        monkeypatch.setattr(protocol, "MAX_CONTEXT", 3)
        connection.advance([NewTokens("a", "", 0, [1, 2]), NewTokens("long", "", 0, [1] * 4)], ())
        wait_until(lambda: tokens_of(connection))
        connection.advance([NewTokens("a", "", 2, [3, 4])], ())
        wait_until(lambda: len(heard) == 2)
        assert heard == [Open(heard[0].request, [1, 2], 9), Close(heard[0].request)]
        assert connection.published == {}


def opened(heard):
    return [message for message in heard if isinstance(message, Open)]


def test_the_next_turn_of_a_conversation_sends_its_new_tokens(connect):
    heard, turn, answer, more = [], list(range(150)), list(range(40)), [7] * 20
    with ServerThread(answering(counting, heard, knows_prefixes=True)) as server:
        connection = connect(server.url)
        connection.advance([NewTokens("a", "salt", 0, turn)], ())
        connection.advance([NewTokens("a", "salt", len(turn), answer)], ())
        connection.advance((), ("a",))
        connection.advance([NewTokens("b", "salt", 0, turn + answer + more)], ())
        connection.advance([NewTokens("c", "other", 0, turn + answer + more)], ())
        wait_until(lambda: len(opened(heard)) == 3)
        server.lose_connections()
        wait_until(lambda: len(opened(heard)) == 5)
    whole, again, of_other, *reopened = opened(heard)
    hashes = block_hashes(turn + answer + more, protocol.tenant_of("salt"))
    assert (whole.prefix, whole.tokens) == (b"", turn)
    assert (again.prefix, again.tokens) == (hashes[1], (turn + answer + more)[2 * BLOCK_TOKENS :])
    assert (of_other.prefix, of_other.tokens) == (b"", turn + answer + more)
    # The server may have kept them beyond the connection.
    assert {message.prefix for message in reopened} == {
        block_hashes(turn + answer + more, protocol.tenant_of(salt))[-1] for salt in ("salt", "other")
    }


def test_a_prefix_that_the_server_does_not_have_is_sent_once_more(connect):
    heard = []

    async def forgetful(socket):
        await hello(socket)
        async for frame in socket:
            for message in protocol.read_from_engine(frame):
                heard.append(message)
                if isinstance(message, Open) and message.prefix:
                    await socket.send(protocol.encode([Missing(message.request)]))

    tokens = list(range(100))
    with ServerThread(forgetful) as server:
        connection = connect(server.url)
        connection.advance([NewTokens("a", "", 0, tokens)], ("a",))
        connection.advance([NewTokens("b", "", 0, tokens)], ())
        wait_until(lambda: len(opened(heard)) == 3)
    first, named, whole = opened(heard)
    assert (first.tokens, named.tokens, whole.tokens) == (tokens, tokens[BLOCK_TOKENS:], tokens)
    assert first.request < named.request < whole.request
    assert (named.prefix, whole.prefix) == (block_hashes(tokens, "")[0], b"")


def test_a_server_that_misses_what_it_was_sent_is_left(connect):
    async def lying(socket):
        await hello(socket)
        async for frame in socket:
            for message in protocol.read_from_engine(frame):
                if isinstance(message, Open):
                    await socket.send(protocol.encode([Missing(message.request)] * 65))

    with ServerThread(lying) as server:
        connection = connect(server.url)
        connection.advance([NewTokens("a", "", 0, list(range(100)))], ())
        wait_until(lambda: connection.num_connections > 1)


def test_a_server_that_does_not_read_is_left(connect, monkeypatch):
    monkeypatch.setattr(module, "MAX_OUTGOING", 8)

    async def read_nothing(socket):
        await hello(socket)
        socket.transport.pause_reading()
        await server.ended.wait()

    with ServerThread(read_nothing) as server:
        connection = connect(server.url)
        number = 0
        while server.num_connections == 1:
            # 100 kB each, until the buffers of both ends are full.
            connection.advance([NewTokens(f"r{number}", "", 0, [2**31 - 1 - number] * 20_000)], ())
            number += 1
            threading.Event().wait(0.002)
            assert number < 2000


def test_what_a_server_writes_is_one_printable_line():
    assert protocol.one_line("a\nb\x1b[31m" + "c" * 999) == "a b [31m" + "c" * 292


def test_frames_are_limited():
    messages = [Committed(1, 0, [1], 0)] * (protocol.MAX_MESSAGES + 5) + [Open(2, [2**31 - 1] * 900_000, 0)]
    frames = frames_of(messages)
    assert [len(protocol.read_from_engine(frame)) for frame in frames] == [protocol.MAX_MESSAGES, 5, 1]
    assert all(len(frame) <= protocol.MAX_ENGINE_FRAME for frame in frames)
    assert frames_of([]) == []


@pytest.mark.parametrize("faults", [100, pytest.param(1000, marks=pytest.mark.perf)])
def test_faults_change_no_answer_and_end_no_thread(connect, faults):
    """Greedy verification of whatever is proposed, as the engine does it."""
    counts: dict[str, int] = {}
    answer = np.random.default_rng(0).integers(0, 100, 4000).tolist()
    with ServerThread(hostile(100, counts)) as server:
        connection = connect(server.url)
        drafter = RemoteDrafter(connection, 100, 4)
        done, number = 0, 0
        tokens = [1, 2]
        while sum(counts.values()) < faults:
            [draft] = drafter.propose([DraftRequest(f"r{number}", np.array(tokens, np.int32), 2, 4)])
            assert len(draft.token_ids) == len(draft.confidence) <= 4
            expected = answer[done : done + 5]
            accepted = next((n for n, t in enumerate(draft.token_ids) if t != expected[n]), len(draft.token_ids))
            tokens += expected[: accepted + 1]
            done += accepted + 1
            if len(tokens) > 60:
                assert tokens[2:] == answer[done - len(tokens) + 2 : done]
                drafter.forget(f"r{number}")
                number, tokens = number + 1, [1, 2]
                done %= 3000
            threading.Event().wait(0.001)
        server.handler = answering(counting)
        wait_until(lambda: connection._thread.is_alive() and connection._is_open, 60)
        assert set(counts) >= {"flood", "garbage", "random tokens", "abort"}


def test_a_local_hello_has_no_fingerprint():
    assert protocol.disagreement(HELLO, OWN) is None
