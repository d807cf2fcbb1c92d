"""What travels between an engine and a draft server, and what is refused."""

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant.remote import protocol
from vllm_instant.remote.protocol import Close, Committed, Declined, Hello, Missing, Open, ProtocolError, Tail

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
COUNTS = st.integers(0, protocol.MAX_CONTEXT)
NUMBERS = st.integers(0, 2**53 - 1)
AHEAD = st.integers(0, protocol.MAX_AHEAD)
HELLOS = st.builds(Hello, st.integers(0, 9), st.text(max_size=20), st.integers(0, 2**20))
OF_ENGINES = (
    HELLOS
    | st.builds(Open, NUMBERS, TOKENS, AHEAD, st.text(max_size=16), st.binary(max_size=16))
    | st.builds(Committed, NUMBERS, COUNTS, TOKENS, AHEAD)
    | st.builds(Close, NUMBERS)
)
OF_SERVERS = (
    HELLOS
    | st.builds(Tail, NUMBERS, NUMBERS, COUNTS, COUNTS, COUNTS, TOKENS, st.binary(max_size=9))
    | st.builds(Declined, NUMBERS, st.text(max_size=40))
    | st.builds(Missing, NUMBERS)
)


@given(st.lists(OF_ENGINES, max_size=5), st.lists(OF_SERVERS, max_size=5))
def test_messages_arrive_as_they_were_sent(of_engine, of_server):
    assert protocol.read_from_engine(protocol.encode(of_engine)) == of_engine
    assert protocol.read_from_server(protocol.encode(of_server)) == of_server


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_refused(frame):
    for read in (protocol.read_from_engine, protocol.read_from_server):
        with suppress(ProtocolError):
            assert len(read(frame)) <= protocol.MAX_MESSAGES


TAIL = [4, 1, 0, 5, 5, 5, [7, 8], b"\x80\x80"]


@pytest.mark.parametrize(
    "message",
    [
        [4, 1, 0, 5, 5, 5, [], b""],
        [4, 1, 0, 5, 5, 5, [7] * (protocol.MAX_AHEAD + 1), b""],
        [4, 1, 0, 5, 5, 5, [-1], b""],
        [4, 1, 0, 5, 5, 5, [2**31], b""],
        [4, 1, 0, 5, 5, 5, [1.0], b""],
        [4, 1, 0, 5, 5, 5, [7], [float("nan")]],
        [4, 1, 0, 5, 5, 5, [7], float("nan")],
        [4, 1, 0, -5, 5, 5, [7], b""],
        [4, 1, 0, 5, protocol.MAX_CONTEXT + 1, 5, [7], b""],
        [4, 2**60, 0, 5, 5, 5, [7], b""],
        [*TAIL, "more"],
        TAIL[:-2],
        [9, 1],
        [5, 1],
        {"request": 1},
        None,
    ],
    ids=[
        "no tokens",
        "too many tokens",
        "negative token",
        "large token",
        "fractional token",
        "probabilities that are no numbers",
        "one that is no number",
        "negative base",
        "beyond any context",
        "large request",
        "a field too many",
        "a field missing",
        "unknown kind",
        "a message of the other end",
        "a map",
        "nothing",
    ],
)
def test_what_a_server_may_not_send(message):
    assert protocol.read_from_server(msgspec.msgpack.encode([TAIL])) != []
    with pytest.raises(ProtocolError):
        protocol.read_from_server(msgspec.msgpack.encode([message]))


def test_frames_have_a_limited_number_of_messages_and_are_binary():
    with pytest.raises(ProtocolError):
        protocol.read_from_server(msgspec.msgpack.encode([TAIL] * (protocol.MAX_MESSAGES + 1)))
    with pytest.raises(ProtocolError, match="binary"):
        protocol.read_from_server("[]")


def test_versions_and_tokenizers_must_agree():
    own = Hello(1, "aa", 100)
    assert protocol.disagreement(own, Hello(1, "aa", 120)) is None
    # An end without a tokenizer, as where --skip-tokenizer-init is set, cannot compare.
    assert protocol.disagreement(own, Hello(1, "", 100)) is None
    assert "version 2 of the protocol, this one 1" in protocol.disagreement(own, Hello(2, "aa", 100))
    assert "tokenizers differ (fingerprint aa here, bb there)" in protocol.disagreement(own, Hello(1, "bb", 100))


def test_a_fingerprint_depends_on_tokens_and_ids_and_on_no_order():
    one = protocol.fingerprint_of({"a": 0, "b": 1, "\ud800": 2})
    assert one == protocol.fingerprint_of({"b": 1, "\ud800": 2, "a": 0})
    assert len({one, protocol.fingerprint_of({"a": 1, "b": 0, "\ud800": 2}), protocol.fingerprint_of({"a": 0})}) == 3


def test_a_tokenizer_that_is_not_there_has_no_fingerprint(tmp_path):
    assert protocol.tokenizer_fingerprint(str(tmp_path)) == ""


def test_a_cache_salt_does_not_travel():
    assert protocol.tenant_of("") == ""
    assert len(protocol.tenant_of("secret")) == 16
    assert "secret" not in protocol.tenant_of("secret") != protocol.tenant_of("other")


def test_probabilities_are_bytes():
    assert protocol.to_bytes([-1.0, 0.0, 0.5, 1.0, 2.0]) == bytes([0, 0, 128, 255, 255])
