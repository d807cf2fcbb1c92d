"""What drafting gained, computed from explained steps."""

import pytest

from vllm_instant.evidence.drafting_balance import balance


def _step(requests, granted, tokens, milliseconds):
    outcome = None if milliseconds is None else {"tokens": tokens, "milliseconds": milliseconds}
    return {"num_requests": requests, "draft_tokens": granted, "outcome": outcome}


def test_drafts_that_bring_nothing_lose_the_time_that_they_take_beyond_a_plain_step():
    found = balance([_step(4, 0, 4, 10.0)] * 9 + [_step(4, 3, 4, 20.0)])
    assert (found.steps, found.drafting) == (10, 1)
    assert found.milliseconds == pytest.approx(110)
    assert found.speed == pytest.approx(100 / 110)


def test_accepted_drafts_are_worth_the_plain_steps_that_they_replace():
    found = balance([_step(1, 0, 1, 10.0), _step(1, 4, 5, 20.0)])
    assert found.speed == pytest.approx(60 / 30)


def test_a_plain_step_that_read_a_prompt_does_not_make_drafts_look_good():
    found = balance([_step(1, 0, 1, 10.0)] * 3 + [_step(1, 0, 1, 80.0), _step(1, 1, 1, 10.0)])
    assert found.speed == pytest.approx(1.0)


def test_numbers_of_requests_without_a_plain_step_are_compared_with_the_nearest():
    found = balance([_step(1, 0, 1, 5.0), _step(8, 0, 8, 40.0), _step(7, 7, 14, 40.0)])
    assert found.undrafted_milliseconds == pytest.approx(5 + 40 + 2 * 40)


def test_steps_under_way_do_not_count_and_without_a_plain_step_there_is_nothing_to_compare_with():
    assert balance([_step(1, 4, 5, 20.0), _step(1, 0, 1, None)]) is None
    assert balance([]) is None
