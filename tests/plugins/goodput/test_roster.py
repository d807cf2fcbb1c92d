"""What is kept of live requests, and of lists of them."""

import numpy as np
import pytest

from vllm_instant import RequestState
from vllm_instant_plugins.goodput.request_table import RequestTable, whole_numbers


def _entered(roster, count, pins=None):
    states = [
        RequestState(f"r{i}", 10 + i, 100, 0.0, index=i, fixed_num_draft_tokens=(pins or {}).get(i))
        for i in range(count)
    ]
    for state in states:
        roster.enter(state, 0)
    return states


def test_the_same_requests_are_looked_up_once():
    roster = RequestTable()
    states = _entered(roster, 3)
    batch = roster.batch(states)
    assert batch.indices.tolist() == [0, 1, 2]
    assert roster.batch(list(states)) is batch
    others = roster.batch(states[:2])
    assert others.indices.tolist() == [0, 1]
    assert roster.batch(tuple(states)) is batch, "plans and outcomes may be of two lists in turn"


def test_a_list_that_changed_is_another_one():
    roster = RequestTable()
    states = _entered(roster, 3)
    before = roster.batch(states)
    states[1] = RequestState("new", 5, 100, 0.0, index=7)
    assert roster.batch(states).indices.tolist() == [0, 7, 2]
    assert [state.request_id for state in before.requests] == ["r0", "r1", "r2"]


def test_a_request_that_comes_again_is_not_the_one_that_was():
    roster = RequestTable()
    [state] = _entered(roster, 1)
    again = RequestState("r0", 10, 100, 0.0, index=0, prompt_token_ids=np.arange(3))
    assert roster.batch([state]) is not roster.batch([again])


def test_who_may_be_planned_for():
    roster = RequestTable()
    batch = roster.batch(_entered(roster, 4, pins={2: 0, 3: 5}))
    assert batch.pins.tolist() == [-1, -1, 0, 5]
    assert batch.free.tolist() == [0, 1]
    assert not batch.all_free
    assert roster.batch(batch.requests[:2]).all_free


def test_requests_beyond_the_first_arrays():
    roster = RequestTable()
    roster.enter(RequestState("far", 7, 100, 0.0, index=300, num_output_tokens=2), 0)
    assert roster.context[300] == 9
    assert roster.pins[[299, 300]].tolist() == [-1, -1]
    assert roster.granted[300] == roster.proposed[300] == 1.0


def test_a_step_gives_each_request_its_accepted_tokens_and_one_more():
    roster = RequestTable()
    batch = roster.batch(_entered(roster, 3))
    assert roster.advance(batch, np.array([4, 0, 2]), np.array([3, 0, 0])) == (33.0, 6, 3)
    assert roster.context[:3].tolist() == [14.0, 12.0, 13.0]


def test_what_the_drafter_delivers_is_compared_with_what_it_was_granted():
    roster = RequestTable()
    states = _entered(roster, 3, pins={1: 4})
    planned = roster.batch(states)
    states[2] = RequestState("new", 5, 100, 0.0, index=2)
    roster.enter(states[2], 9)  # after step 5, in place of the one that was planned for
    now = roster.batch(states)
    lengths, drafted, accepted = np.array([4, 4, 4]), np.array([0, 4, 2]), np.array([0, 3, 2])
    assert roster.compare(5, planned, lengths, now, drafted, accepted) == (2, 1, 2)
    assert roster.granted[:3].tolist() == pytest.approx([0.9 + 4, 0.9 + 4, 0.9 + 2])
    assert roster.proposed[:3].tolist() == pytest.approx([0.9, 0.9 + 4, 0.9 + 2])


@pytest.mark.parametrize("values", [[3], [0, 1] * 9, list(range(250, 270)), (1,) * 12, np.arange(12), [-1] * 10])
def test_whole_numbers_of_any_kind(values):
    found = whole_numbers(values)
    assert found.dtype == np.intp
    assert found.tolist() == list(values)
