"""The line of those that wait, against a list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant_plugins.similarity.waiting_list import Line


@given(st.lists(st.integers(0, 30), max_size=120))
def test_any_coming_and_going_keeps_the_order_of_arrival(indices):
    """An index that waits leaves, one that does not comes, as ``RequestRegistry`` gives them out again."""
    line, expected = Line(2), []
    for index in indices:
        assert (index in line) == (index in expected)
        if index in expected:
            assert line.leave(index) == expected.index(index), "so many came before"
            expected.remove(index)
        else:
            line.enter(index)
            expected.append(index)
        assert line.indices.tolist() == expected
        assert len(line) == len(expected)


def test_who_does_not_wait_cannot_leave():
    with pytest.raises(KeyError):
        Line(2).leave(1)
