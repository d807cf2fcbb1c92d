"""The index finds what a plain search finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant_plugins.suffix import index as module
from vllm_instant_plugins.suffix.index import ENOUGH_CANDIDATES, MAX_CANDIDATES, MAX_MATCH, TokenIndex, find


def _tokens(*values):
    return np.array(values, np.int32)


def _found(index, newest, group=0):
    """Positions behind occurrences, with the lengths of their matches."""
    places, lengths = np.empty((2, MAX_CANDIDATES), np.int64)
    count = find(*index.arrays, index.stop, np.array(newest, np.int32), group, places, lengths)
    return list(zip(places[:count].tolist(), lengths[:count].tolist(), strict=True))


def _by_plain_search(tokens):
    """All earlier occurrences of the newest tokens, the newest first."""
    found = []
    for stop in range(len(tokens) - 1, 0, -1):
        length = 0
        while length < min(stop, MAX_MATCH) and tokens[stop - 1 - length] == tokens[-1 - length]:
            length += 1
        if length:
            found.append((stop, length))
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_it_finds_the_earlier_occurrences(values):
    index = TokenIndex(64, growing=True)
    index.append(_tokens(*values))
    expected = _by_plain_search(values)
    longer = [(place, length) for place, length in expected if length > 1]
    single = [(place, length) for place, length in expected if length == 1]
    assert _found(index, values[-MAX_MATCH:]) == longer + (single if len(longer) < ENOUGH_CANDIDATES else [])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=7), max_size=60))
def test_appending_in_pieces_is_appending_at_once(pieces):
    whole = [token for piece in pieces for token in piece]
    at_once, in_pieces = TokenIndex(512), TokenIndex(512, growing=True)
    at_once.append(np.array(whole, np.int32))
    for piece in pieces:
        in_pieces.append(np.array(piece, np.int32))
    assert in_pieces.tokens.tolist() == whole
    assert _found(at_once, whole[-8:]) == _found(in_pieces, whole[-8:])


def test_groups_do_not_see_each_other():
    index = TokenIndex(64)
    index.append(_tokens(1, 2, 3, 4), group=1)
    index.end_sequence(1)
    assert _found(index, [1, 2], group=0) == []
    assert _found(index, [1, 2], group=1) == [(2, 2)]


def test_the_oldest_make_room():
    index = TokenIndex(16)
    index.append(_tokens(1, 2, 3))
    index.append(np.arange(100, 110, dtype=np.int32))
    assert _found(index, [1, 2]) == [(2, 2)]
    index.append(np.arange(110, 120, dtype=np.int32))
    assert _found(index, [1, 2]) == []
    assert _found(index, [110, 111]) == [(15, 2)]


@pytest.mark.parametrize("begin", [2**32 - 9, 2**32, 2**33 + 5])
def test_positions_beyond_32_bits_are_found(begin):
    index = TokenIndex(64)
    index.stop = begin
    index._begin = begin
    index.append(_tokens(1, 2, 3, 4, 1, 2, 3, 5, 1, 2))
    assert _found(index, [9, 1, 2]) == [(begin + 6, 2), (begin + 2, 2)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=9), st.integers(0, 2)), max_size=40))
def test_a_full_ring_only_finds_what_it_holds(sequences):
    index = TokenIndex(24)
    written = []
    for tokens, group in sequences:
        index.append(np.array(tokens, np.int32), group)
        index.end_sequence(group)
        written += [(token, group) for token in (*tokens, -1)]
    oldest = len(written) - 24
    for group in range(3):
        for newest in ([0, 0], [1, 2], [2, 1, 0], [1]):
            for place, length in _found(index, newest, group):
                assert place - length >= oldest
                assert written[place - length : place] == [(token, group) for token in newest[-length:]]


def test_memory_per_token_is_as_stated():
    index = TokenIndex(1 << 16)
    assert sum(array.nbytes for array in index.arrays) <= 32 * (1 << 16)
    assert "32 bytes per token" in " ".join(str(module.__doc__).split())
