"""The table of live requests, and lists of them."""

import numpy as np
import pytest

from vllm_instant import RequestState
from vllm_instant_plugins.goodput.request_table import RequestTable, to_indices


def _entered(table, count, fixed_lengths=None):
    states = [
        RequestState(f"r{i}", 10 + i, 100, 0.0, index=i, fixed_num_draft_tokens=(fixed_lengths or {}).get(i))
        for i in range(count)
    ]
    for state in states:
        table.enter(state, 0)
    return states


def test_the_same_requests_are_looked_up_once():
    table = RequestTable()
    states = _entered(table, 3)
    batch = table.batch(states)
    assert batch.indices.tolist() == [0, 1, 2]
    assert table.batch(list(states)) is batch
    others = table.batch(states[:2])
    assert others.indices.tolist() == [0, 1]
    assert table.batch(tuple(states)) is batch, "plans and outcomes may be of two lists in turn"


def test_a_list_that_changed_is_another_batch():
    table = RequestTable()
    states = _entered(table, 3)
    before = table.batch(states)
    states[1] = RequestState("new", 5, 100, 0.0, index=7)
    assert table.batch(states).indices.tolist() == [0, 7, 2]
    assert [state.request_id for state in before.requests] == ["r0", "r1", "r2"]


def test_a_request_with_the_same_id_is_another_one():
    table = RequestTable()
    [state] = _entered(table, 1)
    again = RequestState("r0", 10, 100, 0.0, index=0, prompt_token_ids=np.arange(3))
    assert table.batch([state]) is not table.batch([again])


def test_requests_with_fixed_lengths_are_not_planned_for():
    table = RequestTable()
    batch = table.batch(_entered(table, 4, fixed_lengths={2: 0, 3: 5}))
    assert batch.fixed_lengths.tolist() == [-1, -1, 0, 5]
    assert batch.adaptive.tolist() == [0, 1]
    assert not batch.all_adaptive
    assert table.batch(batch.requests[:2]).all_adaptive


def test_requests_beyond_the_first_arrays():
    table = RequestTable()
    table.enter(RequestState("far", 7, 100, 0.0, index=300, num_output_tokens=2), 0)
    assert table.context[300] == 9
    assert table.fixed_lengths[[299, 300]].tolist() == [-1, -1]
    assert table.granted[300] == table.proposed[300] == 1.0


def test_a_step_gives_each_request_its_accepted_tokens_and_one_more():
    table = RequestTable()
    batch = table.batch(_entered(table, 3))
    assert table.advance(batch, np.array([4, 0, 2]), np.array([3, 0, 0])) == (33.0, 6, 3)
    assert table.context[:3].tolist() == [14.0, 12.0, 13.0]


def test_what_the_drafter_delivers_is_compared_with_what_it_was_granted():
    table = RequestTable()
    states = _entered(table, 3, fixed_lengths={1: 4})
    planned = table.batch(states)
    states[2] = RequestState("new", 5, 100, 0.0, index=2)
    table.enter(states[2], 9)  # after step 5, in place of the one that was planned for
    now = table.batch(states)
    lengths, drafted, accepted = np.array([4, 4, 4]), np.array([0, 4, 2]), np.array([0, 3, 2])
    assert table.compare(5, planned, lengths, now, drafted, accepted) == (2, 1, 2)
    assert table.granted[:3].tolist() == pytest.approx([0.9 + 4, 0.9 + 4, 0.9 + 2])
    assert table.proposed[:3].tolist() == pytest.approx([0.9, 0.9 + 4, 0.9 + 2])


def test_only_tokens_that_came_while_the_drafter_was_off_for_a_request_are_uncached():
    table = RequestTable()
    batch = table.batch(_entered(table, 3))
    table.drafter_was_off(batch, np.array([0, 2, 4]))
    table.drafter_skipped(batch, np.array([1, 0, 0]))
    assert table.grant(batch, np.array([3, 0, 1]), 2) == (1 + 6, 4)
    assert table.grant(batch, np.array([1, 1, 1]), 3) == (4, 3)


def test_the_requests_without_drafts_for_longest_come_first():
    table = RequestTable()
    batch = table.batch(_entered(table, 4))
    table.grant(batch, np.array([1, 0, 1, 0]), 5)
    table.grant(batch, np.array([0, 0, 1, 1]), 6)
    assert table.without_recent_drafts(batch, np.array([0, 1, 2, 3]), 2).tolist() == [1, 0]


@pytest.mark.parametrize("values", [[3], [0, 1] * 9, list(range(250, 270)), (1,) * 12, np.arange(12), [-1] * 10])
def test_integers_of_any_kind(values):
    found = to_indices(values)
    assert found.dtype == np.intp
    assert found.tolist() == list(values)


def test_a_draft_model_that_reads_a_long_prompt_is_not_one_that_delivers_little():
    table = RequestTable()
    states = [RequestState("r0", 1200, 100, 0.0, index=0), RequestState("r1", 0, 100, 0.0, index=1)]
    for state in states:
        table.enter(state, 0)
    batch = table.batch(states)
    table.prompts_unread(batch)
    granted, nothing = np.array([4, 4]), np.array([0, 0])
    for step, read in ((1, 512), (2, 512), (3, 176)):
        assert table.grant(batch, granted, step)[0] == read
        table.compare(step, batch, granted, batch, nothing if step < 3 else np.array([4, 0]), nothing)
    rates = table.proposed[:2] / table.granted[:2]
    assert rates[0] == pytest.approx(1.0)
    assert rates[1] < 0.2, "the other one had nothing to read and delivered nothing"
    assert table.uncached_tokens[0] == 0.0
