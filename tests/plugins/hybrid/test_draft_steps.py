"""How far the draft model runs for all requests together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant import DraftCost
from vllm_instant_plugins.hybrid.draft_steps import CatchUp, Lookups, best_draft_steps

ROW = 0.1


def _draft_cost(**of):
    return DraftCost(verify_cost_curve=[(1, ROW), (1000, 1000 * ROW)], per_token=ROW, **of)


def _best(chances, gains=None, uncached_tokens=None, steps=1.0, pinned=(), **of):
    """Requests with these acceptance rates of the draft model, beside lookups with these gains."""
    count = len(chances)
    reached = np.array([[chance ** (j + 1) for j in range(4)] for chance in chances])
    own = np.zeros(count) if gains is None else np.array(gains, float)
    asked = np.isin(np.arange(count), pinned)
    return best_draft_steps(
        reached,
        Lookups(own, own, np.zeros(count, int)),
        CatchUp(np.zeros(count, int) if uncached_tokens is None else np.array(uncached_tokens), np.full(count, steps)),
        np.where(asked, 0.0, ROW),
        asked,
        _draft_cost(**of),
    )


def test_a_model_without_value_does_not_run():
    best, by_model, _, together = _best([0.0, 0.05], draft_fixed=0.1)
    assert (best, by_model.any(), together) == (0, False, 0.0)


def test_each_draft_step_must_pay_for_all_requests_together():
    assert _best([0.9], draft_fixed=0.04, per_draft_step=0.75)[0] == 1
    assert _best([0.9, 0.9], draft_fixed=0.04, per_draft_step=0.75)[0] == 4
    assert _best([0.9, 0.9], gains=[9.0, 9.0])[0] == 0


def test_a_request_stays_with_its_better_source():
    best, by_model, worth, _ = _best([0.9, 0.9, 0.3], gains=[0.0, 9.0, 0.0])
    assert best == 4
    assert by_model.tolist() == [True, False, True]
    assert worth.tolist() == [4, 4, 1]


def test_the_cost_of_catching_up_is_spread_over_the_steps():
    assert _best([0.9], uncached_tokens=[100], catch_up_per_token=0.05)[0] == 0
    assert _best([0.9], uncached_tokens=[100], catch_up_per_token=0.05, steps=10.0)[0] == 4
    assert _best([0.9], uncached_tokens=[1], catch_up_fixed=3.0)[0] == 0
    assert _best([0.9], uncached_tokens=[0], catch_up_fixed=3.0)[0] == 4
    assert _best([0.9], uncached_tokens=[100], catch_up_per_token=0.05, pinned=[0])[0] == 4


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5),
    st.floats(0.0, 2.0),
    st.floats(0.0, 1.0),
    st.floats(0.0, 0.1),
    st.integers(0, 200),
)
@settings(max_examples=80, deadline=None)
def test_it_is_as_good_as_trying_every_number_of_draft_steps(chances, drafting, each, token, uncached_tokens):
    best, by_model, worth, together = _best(
        chances,
        uncached_tokens=[uncached_tokens] * len(chances),
        draft_fixed=drafting,
        per_draft_step=each,
        catch_up_per_token=token,
    )
    found = []
    for draft_steps in range(5):
        total = -(drafting + each * draft_steps) if draft_steps else 0.0
        for chance in chances:
            tokens = [chance ** (j + 1) - ROW for j in range(draft_steps) if chance ** (j + 1) > ROW]
            total += max(0.0, sum(tokens) - token * uncached_tokens) if draft_steps else 0.0
        found.append(total)
    assert together == pytest.approx(max(found), abs=1e-9)
    assert together == pytest.approx(found[best], abs=1e-9)
    assert by_model.any() or max(found) <= 1e-9
    assert (worth <= 4).all()
