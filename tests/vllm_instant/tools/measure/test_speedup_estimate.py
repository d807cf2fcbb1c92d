"""What drafting gained, computed from explained steps."""

import pytest

from vllm_instant.tools.measure.speedup_estimate import decoding_speed, estimate_speedup


def _decisions(*steps):
    """Each step: requests, draft tokens granted, tokens and milliseconds that came of it, prompt tokens read."""
    found = []
    for number, (requests, granted, tokens, milliseconds, *read) in enumerate(steps):
        outcome = {"tokens": tokens, "milliseconds": milliseconds, "prompt_tokens": sum(read)}
        found.append(
            {
                "step": number,
                "num_requests": requests,
                "draft_tokens": granted,
                "outcome": None if milliseconds is None else outcome,
            }
        )
    return found


OFF = (4, 0, 4, 10.0)
END = (4, 0, 4, None)


def test_drafts_that_bring_nothing_lose_the_time_of_making_and_of_verifying_them():
    found = estimate_speedup(_decisions(*[OFF] * 8, (4, 0, 4, 13.0), (4, 3, 4, 20.0), OFF, END))
    assert (found.steps, found.drafting) == (11, 2)
    assert found.milliseconds == pytest.approx(90 + 13 + 20)
    assert found.speed == pytest.approx(110 / 123)


def test_accepted_drafts_are_worth_the_plain_steps_that_they_replace():
    found = estimate_speedup(
        _decisions((1, 0, 1, 10.0), (1, 0, 1, 10.0), (1, 4, 5, 20.0), (1, 0, 1, 10.0), (1, 0, 1, None))
    )
    assert found.speed == pytest.approx((10 + 10 + 50 + 10) / (10 + 10 + 20 + 10))


def test_steps_that_read_prompts_are_neither_gain_nor_loss():
    found = estimate_speedup(_decisions(OFF, OFF, (4, 0, 4, 90.0, 300), (4, 2, 4, 95.0, 300), OFF, END))
    assert found.steps == 3
    assert found.speed == pytest.approx(1.0)


def test_numbers_of_requests_without_a_plain_step_are_compared_with_the_nearest():
    found = estimate_speedup(_decisions((1, 0, 1, 5.0), (8, 0, 8, 40.0), (8, 0, 8, 40.0), (7, 7, 14, 40.0), END))
    assert found.undrafted_milliseconds == pytest.approx(5 + 40 + 40 + 2 * 40)


def test_of_a_step_that_was_planned_twice_the_later_plan_counts():
    decisions = _decisions(OFF, OFF, OFF, END)
    decisions.insert(1, {"step": 1, "num_requests": 3, "draft_tokens": 9, "outcome": None})
    assert estimate_speedup(decisions).drafting == 0


def test_without_a_plain_step_there_is_nothing_to_compare_with():
    assert estimate_speedup(_decisions((1, 4, 5, 20.0), (1, 4, 5, 20.0), (1, 4, 1, None))) is None
    assert estimate_speedup([]) is None


def test_steps_of_which_it_is_not_known_what_they_read_do_not_count():
    outcome = {"tokens": 1, "milliseconds": 10.0}
    decisions = [{"step": n, "num_requests": 1, "draft_tokens": 0, "outcome": outcome} for n in range(4)]
    assert estimate_speedup(decisions) is None


def test_how_fast_full_steps_decode():
    steps = _decisions(OFF, (4, 8, 12, 20.0), (4, 8, 12, 99.0, 300), (3, 8, 9, 50.0), END)
    assert decoding_speed(steps, 4) == pytest.approx(16 / 0.030)
    assert decoding_speed(steps, 5) is None
