"""Whatever tails arrive, a draft continues the committed tokens as one branch, from its base on, has them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant.remote.protocol import MAX_AHEAD, Tail
from vllm_instant_plugins.remote.branches import MAX_BRANCHES, NO_PROBABILITY, RequestBranches, continuation

VOCABULARY = 3
"""Few tokens, so that wrong branches often fit for a while."""
TOKENS = st.lists(st.integers(0, VOCABULARY), min_size=1, max_size=5)
SMALL = st.integers(0, 14)
TAILS = st.builds(
    lambda *fields: ("tail", Tail(1, *fields)),
    st.integers(0, 6),
    SMALL,
    SMALL,
    SMALL,
    TOKENS,
    st.sampled_from([b"", b"\x80", b"\x80\xff"]),
)
HONEST = st.tuples(st.just("honest"), st.integers(0, 2), TOKENS)
"""A tail that continues a branch, or a new branch a few tokens behind the newest committed token."""
COMMITS = st.tuples(st.just("commit"), st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4))


def array(tokens):
    return np.array(tokens, np.int32)


@settings(max_examples=400)
@given(st.lists(TAILS | HONEST | COMMITS, max_size=40), st.integers(1, 6))
def test_a_draft_continues_the_committed_tokens_from_its_base_on(events, limit):
    committed = [0, 1]
    branches = RequestBranches(committed, 8, VOCABULARY)
    claimed: dict[int, tuple[int, list[int]]] = {}
    """Base and tokens of every branch, as its accepted tails have them."""
    newest = 0
    for kind, *event in events:
        if kind == "commit":
            # The engine has the tokens before the thread that keeps the branches.
            check(branches, [*committed, *event[0]], claimed, limit)
            committed += event[0]
            branches.commit(event[0], 8)
        else:
            tail = event[0] if kind == "tail" else honest(event, branches, committed, newest)
            newest = max(newest, tail.branch + 1)
            before = branches.published
            if branches.add(tail) and branches.published != before:
                base, tokens = claimed.setdefault(tail.branch, (tail.base, []))
                assert (base, base + len(tokens)) == (tail.base, tail.position)
                tokens += tail.tokens
        assert len(branches.published) <= MAX_BRANCHES
        check(branches, committed, claimed, limit)


def honest(event, branches, committed, newest):
    back, tokens = event
    tokens = [token % VOCABULARY for token in tokens]
    if branches.published and back == 0:
        known = branches.published[-1]
        return Tail(1, known.number, known.base, known.stop, len(committed), tokens)
    base = len(committed) - back
    return Tail(1, newest, base, base, base, tokens)


def check(branches, committed, claimed, limit):
    draft = continuation(branches.published, array(committed), limit)
    if draft is None:
        return
    assert 1 <= len(draft.tokens) == len(draft.probabilities) == len(draft.ages) <= limit
    assert max(draft.tokens) < VOCABULARY
    assert min(draft.ages) >= 0
    fitting = [
        tokens[len(committed) - base :][:limit]
        for base, tokens in claimed.values()
        if base <= len(committed) and tokens[: len(committed) - base] == committed[base:]
    ]
    assert list(draft.tokens) in fitting


def tail(branch, base, position, seen, tokens, probabilities=b""):
    return Tail(1, branch, base, position, seen, tokens, probabilities)


def drafted(branches, committed, limit=8):
    found = continuation(branches.published, array(committed), limit)
    return None if found is None else list(found.tokens)


def test_a_late_tail_is_used_if_the_answer_went_its_way():
    branches = RequestBranches([5, 6], 16, 100)
    assert branches.add(tail(0, 2, 2, 2, [7, 8, 9, 10]))
    assert drafted(branches, [5, 6, 7, 8]) == [9, 10]
    assert drafted(branches, [5, 6, 7, 1]) is None
    branches.commit([7, 8], 16)
    # It was sent when two tokens were known, and arrives when four are.
    assert branches.add(tail(1, 2, 2, 2, [7, 8, 30, 31, 32]))
    assert drafted(branches, [5, 6, 7, 8]) == [30, 31, 32]


def test_a_branch_that_is_behind_waits_for_its_next_tail():
    branches = RequestBranches([5], 16, 100)
    branches.add(tail(0, 1, 1, 1, [6]))
    branches.commit([6, 7, 8], 16)
    assert drafted(branches, [5, 6, 7, 8]) is None
    assert branches.add(tail(0, 1, 2, 1, [7, 8, 9]))
    assert drafted(branches, [5, 6, 7, 8]) == [9]


def test_a_late_tail_that_differs_ends_its_branch():
    branches = RequestBranches([5], 16, 100)
    branches.add(tail(0, 1, 1, 1, [6]))
    branches.commit([6, 7, 8], 16)
    assert branches.add(tail(0, 1, 2, 1, [7, 1, 9]))
    assert branches.published == ()
    # What follows of it is late, not wrong.
    assert branches.add(tail(0, 1, 5, 1, [9]))
    assert branches.published == ()


def test_a_branch_for_another_outcome_takes_over():
    branches = RequestBranches([5], 16, 100)
    branches.add(tail(0, 1, 1, 1, [6, 7, 8, 9]))
    branches.add(tail(1, 1, 1, 1, [6, 20, 21]))
    assert drafted(branches, [5]) == [6, 7, 8, 9]
    branches.commit([6, 20], 16)
    assert drafted(branches, [5, 6, 20]) == [21]


@pytest.mark.parametrize(
    "wrong",
    [
        tail(1, 3, 3, 3, [1]),
        tail(1, 2, 2, 3, [1]),
        tail(1, 2, 1, 2, [1]),
        tail(1, 2, 3, 2, [1]),
        tail(1, 2, 2, 2, [1, 2], b"\x80"),
        tail(1, 2, 2, 2, [100]),
        tail(1, 2, 2, 2, [1] * 9),
        tail(0, 2, 2, 2, [1]),
        tail(0, 1, 4, 2, [1]),
    ],
    ids=[
        "base not committed",
        "knows too much",
        "before its base",
        "gap",
        "a probability missing",
        "no token of the model",
        "further ahead than asked for",
        "twice the same position",
        "another base",
    ],
)
def test_wrong_tails_are_dropped(wrong):
    branches = RequestBranches([5, 6], 8, 100)
    assert branches.add(tail(0, 2, 2, 2, [7, 8]))
    before = branches.published
    assert not branches.add(wrong)
    assert branches.published == before


def test_ages_count_from_the_newest_token_that_the_drafter_knew():
    branches = RequestBranches([5, 6], 16, 100)
    branches.add(tail(0, 2, 2, 2, [7, 8], b"\xff\x00"))
    branches.commit([7], 16)
    branches.add(tail(0, 2, 4, 3, [9]))
    found = continuation(branches.published, array([5, 6, 7]), 8)
    assert found.ages == [1, 1]
    assert found.probabilities == (0, NO_PROBABILITY)


def test_more_is_drafted_ahead_where_tails_arrive_late():
    branches = RequestBranches([5, 6], MAX_AHEAD, 100)
    branches.add(tail(0, 2, 2, 2, [7]))
    assert branches.ahead(4) == 9
    branches.commit([7] * 10, MAX_AHEAD)
    branches.add(tail(1, 2, 2, 2, [7]))
    assert branches.ahead(4) == 9 + 15
    for _ in range(40):
        branches.add(tail(1, 2, branches.published[-1].stop, 12, [7]))
    assert branches.ahead(4) == 9
    assert branches.ahead(63) <= MAX_AHEAD
