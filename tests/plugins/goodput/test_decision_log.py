"""What decisions say, and which words ``vllm-instant explain`` prints of them."""

import pytest

from vllm_instant import RequestState, StepOutcome, UpcomingStep
from vllm_instant_plugins.goodput.plugin import PLUGIN, GoodputOptions
from vllm_instant_plugins.goodput.policy import GoodputPolicy


def _run(steps=30, num_accepted=1, **request):
    policy = GoodputPolicy(8, 8)
    state = RequestState("a-1", 50, 100, 0.0, index=0, **request)
    policy.enter(state)
    length = 0
    for number in range(1, steps):
        [following] = policy.get_num_draft_tokens(UpcomingStep([state], 8, number=number))
        accepted = min(num_accepted, length)
        policy.observe(
            StepOutcome([state], [length], [accepted], 1 + length, 0.02 + 1e-4 * length, 1, number, following)
        )
        length = following
    return policy


def test_a_request_whose_client_fixed_the_length_has_no_expectation():
    [decision] = _run(fixed_num_draft_tokens=3).decisions(1)
    assert decision["reason"] == "pinned"
    assert decision["expected"] is None
    summary = decision["summary"]
    assert {summary[heading] for heading in ("gain", "expected tokens in ms", "without drafts ms", "worth from")} == {
        "–"
    }
    assert summary["drafts"] == "3"


def test_the_first_step_has_no_expectation_either():
    first = _run(3).decisions(10)[0]
    assert (first["reason"], first["expected"]) == ("learning", None)


def test_each_decision_has_its_row_and_a_sentence_that_explains_its_reason():
    decisions = _run(60).decisions(100)
    for decision in decisions:
        assert decision["explanation"].startswith(f"{decision['reason']}: ")
        assert "no further" not in decision["explanation"]
    estimated = decisions[-2]["summary"]
    assert list(estimated) == [
        "step",
        "reason",
        "requests",
        "acceptance",
        "drafts",
        "worth from",
        "gain",
        "expected tokens in ms",
        "without drafts ms",
        "actual tokens in ms",
        "accepted",
    ]
    assert estimated["gain"].endswith("×")
    assert "in" in estimated["expected tokens in ms"]
    assert decisions[-1]["summary"]["actual tokens in ms"] == "…", "its step has not run yet"


def test_of_one_request_the_row_shows_its_own_figures():
    policy = _run(20)
    summary = policy.decisions(1, "a")[0]["summary"]
    assert "its acceptance" in summary
    assert "its drafts" in summary
    assert policy.decisions(1, "another") == []


def test_calibration_drafts_at_random_where_the_costs_are_stored():
    assert PLUGIN.calibration_options(GoodputOptions()) == {"calibrating": True}
    with pytest.raises(ValueError, match="would be lost"):
        PLUGIN.calibration_options(GoodputOptions(keep_costs=False))


def test_one_call_returns_a_limited_number_of_rows(monkeypatch):
    from vllm_instant_plugins.goodput import decision_log

    policy = _run(steps=40)
    assert len(policy.decisions(2048)) > 20
    monkeypatch.setattr(decision_log, "MAX_ROWS", 10)
    assert len(policy.decisions(2048)) == 10
    # To find one request's rows more may be compared than are returned.
    assert policy.decisions(2048, "another") == []
    monkeypatch.setattr(decision_log, "MAX_ROWS", 0)
    assert len(policy.decisions(2048)) == 1
