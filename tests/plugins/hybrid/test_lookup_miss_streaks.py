"""The value of the draft model's tokens during miss streaks."""

import numpy as np
import pytest

from vllm_instant import DraftCost, DraftRequest
from vllm_instant_plugins.hybrid.lookup_miss_streaks import MAX_STEPS, MIN_GAIN, LookupMissStreaks

PRICE = DraftCost(per_token=0.1, baseline_step=3.0)


def _values(streaks, gain, draft_cost=PRICE, name="a", pinned=False):
    request = DraftRequest(name, np.array([1, 2, 3], np.int32), 2, 4, "", pinned)
    return streaks.values([request], np.array([gain]), draft_cost, 4)[0][0]


def _steps(streaks, gain):
    request = DraftRequest("a", np.array([1, 2, 3], np.int32), 2, 4)
    return float(streaks.values([request], np.array([gain]), PRICE, 4)[1][0])


def test_a_token_counts_as_one_where_the_lookup_finds_something():
    assert _values(LookupMissStreaks(), MIN_GAIN).tolist() == [1.0] * 4


def test_the_first_token_saves_a_step():
    assert _values(LookupMissStreaks(), 0.0)[0] == pytest.approx(3.0)


def test_each_request_saves_its_share_of_the_step():
    """However many get drafts in it."""
    requests = [DraftRequest(name, np.array([1, 2], np.int32), 1, 4) for name in "abc"]
    values, _ = LookupMissStreaks().values(requests, np.array([0.0, 9.0, 0.0]), PRICE, 4)
    assert values[0, 0] == values[2, 0] == pytest.approx(3.0)
    assert values[1].tolist() == [1.0] * 4


def test_the_length_of_miss_streaks_is_learned():
    long, short = LookupMissStreaks(), LookupMissStreaks()
    for step in range(200):
        lasting = _values(long, 0.0)
        ending = _values(short, 0.0 if step % 2 else 2.0)
    assert lasting == pytest.approx([3.0] * 4, rel=0.1)
    assert ending[0] == pytest.approx(3.0)
    assert ending[1:] == pytest.approx([0.1] * 3, abs=0.3)


def test_miss_streaks_are_expected_to_last_as_before():
    long, short = LookupMissStreaks(), LookupMissStreaks()
    assert _steps(LookupMissStreaks(), 2.0) == 1.0
    for step in range(400):
        lasting = _steps(long, 0.0)
        ending = _steps(short, 0.0 if step % 2 else 2.0)
    assert lasting == MAX_STEPS
    assert ending == pytest.approx(1.0, abs=0.2)


def test_other_requests_start_with_what_was_learned_and_ended_requests_are_forgotten():
    streaks = LookupMissStreaks()
    for _ in range(400):
        _values(streaks, 0.0, name="a")
    assert _values(streaks, 0.0, name="b")[3] > 2.8
    streaks.forget("a")
    assert not streaks._by_request
    streaks.forget("b")
    assert not streaks._missed


@pytest.mark.parametrize(
    "changed", [{"draft_cost": DraftCost(per_token=0.1)}, {"pinned": True}], ids=["unpriced", "pinned"]
)
def test_without_a_known_step_time_tokens_count_as_one(changed):
    assert _values(LookupMissStreaks(), 0.0, **changed).tolist() == [1.0] * 4
