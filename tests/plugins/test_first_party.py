"""First-party policies, without an engine."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_instant import RequestState, UpcomingStep
from vllm_instant_plugins.speculation import Fixed


@given(st.none() | st.integers(0, 9), st.none() | st.integers(1, 9), st.integers(0, 12), st.integers(0, 8))
def test_fixed(length, max_batch_size, requests, most):
    states = [RequestState(f"r{i}", 1, 1, 0.0) for i in range(requests)]
    lengths = Fixed(length, max_batch_size).get_num_draft_tokens(UpcomingStep(states, most))
    too_many = max_batch_size is not None and requests > max_batch_size
    wanted = 0 if too_many else min(most, length if length is not None else most)
    assert lengths == [wanted] * requests
