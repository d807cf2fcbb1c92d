"""Trimming drafts by the cost of their verification."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant import Draft, DraftCost
from vllm_instant.speculation.draft_plan import trim_drafts

CHANCE = st.floats(0.0, 1.0)


def _drafts(*confidences):
    return [Draft(list(range(len(c))), c) for c in confidences]


def _linear(row, start=0.0):
    return DraftCost(verify_cost_curve=[(1, start + row), (100, start + 100 * row)])


@given(
    st.lists(st.lists(CHANCE, max_size=3), min_size=1, max_size=3),
    st.lists(st.floats(-0.5, 1.0), min_size=9, max_size=9),
)
def test_no_other_trimming_has_a_higher_value(confidences, steps):
    draft_cost = DraftCost(verify_cost_curve=list(enumerate(np.cumsum(steps).tolist(), 1)))
    cost = [0.0, *(c for _, c in draft_cost.verify_cost_curve)]
    reach = [np.cumprod(c) if c else np.zeros(0) for c in confidences]

    def earned(lengths):
        return sum(float(r[:k].sum()) for r, k in zip(reach, lengths, strict=True)) - cost[sum(lengths)]

    drafts = _drafts(*confidences)
    kept = trim_drafts(drafts, draft_cost, [False] * len(drafts))
    assert all(list(k) == list(d.token_ids[: len(k)]) for k, d in zip(kept, drafts, strict=True))
    best = max(earned(lengths) for lengths in itertools.product(*(range(len(c) + 1) for c in confidences)))
    assert earned([len(k) for k in kept]) == pytest.approx(best)


def test_without_a_cost_curve_nothing_is_trimmed():
    assert trim_drafts(_drafts([0.0, 0.0]), DraftCost(), [False]) == [[0, 1]]


def test_drafts_without_confidence_and_fixed_ones_are_kept_whole():
    drafts = [[1, 2], Draft([3, 4], [0.1, 0.1]), Draft([5], [0.1])]
    assert trim_drafts(drafts, _linear(0.9, 9.0), [False, True, False]) == [[1, 2], [3, 4], []]


def test_the_fixed_cost_is_paid_by_drafts_that_are_kept_whole():
    draft_cost = _linear(0.5, 9.0)
    assert trim_drafts(_drafts([0.9]), draft_cost, [False]) == [[]]
    assert trim_drafts([Draft([1], [0.9]), [7]], draft_cost, [False, False]) == [[1], [7]]


def test_of_equal_tokens_those_of_the_first_requests_are_kept():
    draft_cost = DraftCost(verify_cost_curve=[(1, 0.1), (2, 0.2), (3, 9.0)])
    assert trim_drafts(_drafts([0.5], [0.5], [0.5]), draft_cost, [False] * 3) == [[0], [0], []]
