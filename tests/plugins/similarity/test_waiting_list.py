"""The waiting list against a plain list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant_plugins.similarity.waiting_list import WaitingList


@given(st.lists(st.integers(0, 30), max_size=120))
def test_any_sequence_of_additions_and_removals_keeps_the_order_of_arrival(indices):
    """An index in the list is removed, any other is added, as ``RequestRegistry`` reuses them."""
    waiting, expected = WaitingList(2), []
    for index in indices:
        assert (index in waiting) == (index in expected)
        if index in expected:
            assert waiting.remove(index) == expected.index(index), "number of older requests"
            expected.remove(index)
        else:
            waiting.add(index)
            expected.append(index)
        assert waiting.indices.tolist() == expected
        assert len(waiting) == len(expected)


def test_removing_a_request_that_does_not_wait_is_an_error():
    with pytest.raises(KeyError):
        WaitingList(2).remove(1)
