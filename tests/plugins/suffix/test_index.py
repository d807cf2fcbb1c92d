"""The index finds what a plain search finds, and proposes what followed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant_plugins.suffix.index import MAX_MATCH, ORDER, TokenIndex

SURE = np.ones(400)


def _tokens(*values):
    return np.array(values, np.int32)


def _propose(index, newest, most=8, least=0.0, group=0):
    return index.propose(np.asarray(newest, np.int32), most, SURE, least, group)


def _reference_match(tokens):
    """By plain search: the longest run before the end that equals the end, at most ``MAX_MATCH``."""
    best = 0
    for stop in range(ORDER, len(tokens)):
        length = 0
        while length < min(stop, MAX_MATCH) and tokens[stop - 1 - length] == tokens[-1 - length]:
            length += 1
        best = max(best, length if length >= ORDER else 0)
    return best


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=ORDER, max_size=20))
def test_it_finds_the_longest_earlier_match(values):
    index = TokenIndex(64, growing=True)
    index.append(_tokens(*values))
    found = _propose(index, values[-MAX_MATCH:], most=1)
    longest = _reference_match(values)
    assert len(found.tokens) == (longest > 0)
    if longest:
        # The proposed token follows the match with the most weight, which may be several shorter ones.
        assert ORDER <= found.matched[0] <= longest


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=7), max_size=60))
def test_appending_in_pieces_is_appending_at_once(pieces):
    whole = [token for piece in pieces for token in piece]
    at_once, in_pieces = TokenIndex(512), TokenIndex(512, growing=True)
    at_once.append(np.array(whole, np.int32))
    for piece in pieces:
        in_pieces.append(np.array(piece, np.int32))
    assert in_pieces.tokens.tolist() == whole
    one, other = _propose(at_once, whole[-8:]), _propose(in_pieces, whole[-8:])
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.confidence == pytest.approx(other.confidence)


def test_a_repetition_is_continued():
    index = TokenIndex(64)
    index.append(_tokens(1, 2, 3, 4, 5, 9, 1, 2))
    found = _propose(index, [9, 1, 2], most=3)
    assert found.tokens.tolist() == [3, 4, 5]
    assert found.matched.tolist() == [2, 3, 4]


def test_the_more_frequent_continuation_wins_and_states_its_confidence():
    index = TokenIndex(64)
    index.append(_tokens(1, 2, 3, 8, 1, 2, 3, 9, 1, 2, 4, 7, 1, 2))
    found = _propose(index, [1, 2], most=2)
    assert found.tokens[0] == 3
    assert found.confidence[0] == pytest.approx(2 / 3)


def test_a_proposal_ends_where_it_becomes_unlikely():
    index = TokenIndex(64)
    index.append(_tokens(1, 2, 3, 4, 5, 6, 7, 1, 2))
    rates = np.full(400, 0.5)
    assert len(index.propose(_tokens(1, 2), 5, rates, 0.2).tokens) == 2


def test_groups_do_not_see_each_other():
    index = TokenIndex(64)
    index.append(_tokens(1, 2, 3, 4), group=1)
    index.end_sequence(1)
    assert _propose(index, [1, 2], group=0).tokens.tolist() == []
    assert _propose(index, [1, 2], group=1).tokens.tolist() == [3, 4]


def test_a_sequence_does_not_continue_in_the_next_one():
    index = TokenIndex(64)
    index.append(_tokens(5, 1, 2))
    index.end_sequence()
    index.append(_tokens(3, 4, 4, 4))
    index.end_sequence()
    assert _propose(index, [1, 2]).tokens.tolist() == []
    assert _propose(index, [2, 3]).tokens.tolist() == []


def test_the_oldest_make_room():
    index = TokenIndex(16)
    index.append(_tokens(1, 2, 3))
    for start in range(100, 160, 10):
        assert _propose(index, [1, 2]).tokens.tolist() == (
            [3] if start == 100 else _propose(index, [1, 2]).tokens.tolist()
        )
        index.append(np.arange(start, start + 10, dtype=np.int32))
    assert _propose(index, [1, 2]).tokens.tolist() == []
    assert _propose(index, [150, 151], most=2).tokens.tolist() == [152, 153]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=9), st.integers(0, 2)), max_size=40))
def test_a_full_ring_only_proposes_what_it_holds(sequences):
    index = TokenIndex(24)
    written = []
    for tokens, group in sequences:
        index.append(np.array(tokens, np.int32), group)
        index.end_sequence(group)
        written += [(token, group) for token in (*tokens, -1)]
    kept = written[-24:]
    for group in range(3):
        for newest in ([0, 0], [1, 2], [2, 1, 0]):
            found = _propose(index, newest, group=group).tokens.tolist()
            assert all(token >= 0 for token in found)
            # The first proposed token follows the newest two somewhere, in what is kept of this group.
            places = (kept[start : start + 3] for start in range(len(kept) - 2))
            wanted = [(token, group) for token in (*newest[-2:], *found[:1])]
            assert not found or wanted in places
