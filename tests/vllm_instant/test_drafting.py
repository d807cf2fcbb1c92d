"""Cutting drafts by what they cost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant import Draft, DraftPrice
from vllm_instant.drafting import worthwhile

CHANCE = st.floats(0.0, 1.0)


def _drafts(*confidences):
    return [Draft(list(range(len(c))), c) for c in confidences]


@given(st.lists(st.lists(CHANCE, max_size=8), min_size=1, max_size=6), CHANCE, st.floats(0.0, 3.0))
def test_what_is_kept_earns_its_price_and_what_is_cut_would_not(confidences, row, verifying):
    drafts = _drafts(*confidences)
    kept = worthwhile(drafts, DraftPrice(row=row, verifying=verifying), [False] * len(drafts))
    surplus = possible = 0.0
    for draft, chosen in zip(drafts, kept, strict=True):
        reach = np.cumprod(draft.confidence) if draft.confidence else np.zeros(0)
        assert list(chosen) == draft.token_ids[: len(chosen)]
        assert all(chance >= row for chance in reach[: len(chosen)])
        surplus += float((reach[: len(chosen)] - row).sum())
        possible += float(np.maximum(reach - row, 0.0).sum())
    if any(len(chosen) for chosen in kept):
        assert surplus == pytest.approx(possible)
        assert surplus > verifying or verifying == 0
    else:
        assert possible <= verifying + 1e-9 or verifying == 0


def test_free_drafts_stay_whole():
    assert worthwhile(_drafts([0.0, 0.0]), DraftPrice(), [False]) == [[0, 1]]


def test_drafts_without_confidence_and_pinned_ones_are_not_touched():
    dear = DraftPrice(row=0.9, verifying=9.0)
    drafts = [[1, 2], Draft([3, 4], [0.1, 0.1]), Draft([5], [0.1])]
    assert worthwhile(drafts, dear, [False, True, False]) == [[1, 2], [3, 4], []]


def test_a_step_that_verifies_anyway_takes_what_earns_its_rows():
    price = DraftPrice(row=0.5, verifying=9.0)
    assert worthwhile(_drafts([0.9]), price, [False]) == [()]
    assert worthwhile([Draft([1], [0.9]), [7]], price, [False, False]) == [[1], [7]]
