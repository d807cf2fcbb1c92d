"""Both ends of the protocol with any delays between them, and a model whose tokens are given."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant.remote.protocol import ProtocolError
from vllm_instant.tools.draft_server.drafting import MAX_ALTERNATIVES, DraftedRequest, Guess
from vllm_instant_plugins.remote.branches import MAX_BRANCHES, RequestBranches, continuation

PROMPT = [3, 1]
EVENTS = st.lists(st.sampled_from(["draft", "draft", "idle", "to the engine", "to the server", "step", "wrong step"]))


def model(sequence, unsure=False):
    """The token after a sequence, and the second most probable one."""
    token = int(sum(sequence[-2:]) * 7 + len(sequence)) % 10
    return Guess(token, 0.55 if unsure else 0.9, (token + 1) % 10, 0.4 if unsure else 0.05)


def draft(request, idle, count=3, unsure=False):
    path = request.next_work(idle)
    if path is None:
        return None
    sequence = request.sequence(path).tolist()
    guesses = []
    for _ in range(min(count, request.room(path))):
        guesses.append(model(sequence, unsure))
        sequence.append(guesses[-1].token)
    return request.extend(path, guesses)


@settings(max_examples=300)
@given(EVENTS, st.booleans())
def test_an_honest_server_is_never_refused_and_drafts_what_the_model_says(events, unsure):
    request, branches = DraftedRequest(1, PROMPT, 9), RequestBranches(PROMPT, 9, 10)
    committed = list(PROMPT)
    to_server, to_engine = [], []
    for event in events:
        if event in ("draft", "idle"):
            tail = draft(request, event == "idle", unsure=unsure)
            if tail is not None:
                to_engine.append(tail)
        elif event == "to the engine" and to_engine:
            assert branches.add(to_engine.pop(0))
            assert len(branches.published) <= MAX_BRANCHES
        elif event == "to the server" and to_server:
            request.commit(*to_server.pop(0))
        elif event in ("step", "wrong step"):
            found = continuation(branches.published, np.array(committed, np.int32), 4)
            right = [model(committed, unsure).token]
            if event == "wrong step":
                right = [model(committed, unsure).other]
            for token in found.tokens if found else ():
                if token != right[-1]:
                    break
                right.append(model(committed + right, unsure).token)
            ahead = branches.ahead(4)
            to_server.append((len(committed), right, ahead))
            committed += right
            branches.commit(right, ahead)
    # Once everything has arrived and the server has had time, there is a draft, and it is the model's.
    for message in to_server:
        request.commit(*message)
    for tail in to_engine:
        assert branches.add(tail)
    while (tail := draft(request, False, unsure=unsure)) is not None:
        assert branches.add(tail)
    assert list(request.committed) == committed
    found = continuation(branches.published, np.array(committed, np.int32), 4)
    expected = list(committed)
    for _ in range(4):
        expected.append(model(expected, unsure).token)
    assert list(found.tokens) == expected[len(committed) :][: len(found.tokens)]
    assert len(found.tokens) == 4


def test_a_path_runs_ahead_as_far_as_it_was_asked_to():
    request = DraftedRequest(1, PROMPT, 5)
    drafted = 0
    while (tail := draft(request, False)) is not None:
        drafted += len(tail.tokens)
    assert drafted == request.num_ahead == 5
    request.commit(2, [request._paths[0].tokens[0]], 9)
    assert request.num_accepted == 1
    assert request.num_ahead == 4
    assert len(draft(request, False, count=99).tokens) == 5


def test_a_path_that_is_unlikely_by_now_is_not_extended():
    request = DraftedRequest(1, PROMPT, 100)
    while draft(request, False, unsure=True) is not None:
        pass
    assert 0.55**request.num_ahead < 0.02 < 0.55 ** (request.num_ahead - 3)


def test_with_time_left_other_likely_outcomes_are_drafted_for():
    request = DraftedRequest(1, PROMPT, 4)
    path = request.next_work(False)
    while draft(request, False, unsure=True) is not None:
        pass
    tails = []
    while (tail := draft(request, True, unsure=True)) is not None:
        tails.append(tail)
    assert [tail.branch for tail in tails] == sorted(tail.branch for tail in tails)
    assert len({tail.branch for tail in tails}) == MAX_ALTERNATIVES
    other = path.tokens[0] + 1
    assert tails[0].tokens[0] == other % 10
    assert tails[0].position == tails[0].base == 2
    # The answer goes that way: the branch is the path from now on, and nothing is drafted twice.
    request.commit(2, tails[0].tokens[:2], 4)
    assert request.num_restarts == 0
    assert request.num_ahead >= 2
    request.commit(4, [99], 4)
    assert (request.num_restarts, request.num_ahead) == (1, 0)


def test_what_was_drafted_for_a_path_that_is_gone_is_not_sent():
    request = DraftedRequest(1, PROMPT, 4)
    path = request.next_work(False)
    request.commit(2, [9], 4)
    assert request.extend(path, [model(PROMPT)]) is None
    assert request.sequence(request.next_work(False)).tolist() == [*PROMPT, 9]


def test_a_gap_is_refused():
    request = DraftedRequest(1, PROMPT, 4)
    with pytest.raises(ProtocolError, match="from position 2 on were due, found 3"):
        request.commit(3, [1], 4)
