from __future__ import annotations

import math
from pathlib import Path

import pytest

from vllm_instant_loadtests.capacity import CapacityPlan, offered_rate
from vllm_instant_loadtests.capacity_goals import (
    GoalError,
    clearly_too_fast,
    count_probe,
    parse_goals,
    within_limits,
)
from vllm_instant_loadtests.run_recorder import RecordedRequest
from vllm_instant_loadtests.scenario import ScenarioError, parse

GOALS = parse_goals(["ttft_p95_ms=500", "itl_p99_ms=50"], 0.9)


def answered(due: float, ttft: float = 0.1, step: float = 0.02, tokens: int = 11, **more) -> RecordedRequest:
    arrivals = [(due + ttft + step * n, n + 1) for n in range(tokens)]
    given = {"id": "", "server": "s", "kind": "a", "route": "chat", "sent": due, "ended": arrivals[-1][0]}
    return RecordedRequest(**{**given, "due": due, "arrivals": arrivals, **more})


def counted(requests, span=(0.0, 10.0)):
    return count_probe(GOALS, requests, server="s", rate=1.0, span=span)


@pytest.mark.parametrize(
    ("goals", "attain", "message"),
    [
        ([], 0.95, "give at least one --goal, for example --goal ttft_p95_ms=500"),
        (["ttft=500"], 0.95, "--goal ttft=500 should be METRIC_pPERCENT_ms=MILLISECONDS"),
        (["ttft_p0_ms=500"], 0.95, "--goal ttft_p0_ms=500 should be"),
        (["ttft_p95_ms=1", "ttft_p95_ms=2"], 0.95, "--goal ttft_p95_ms is given twice"),
        (["ttft_p95_ms=1"], 1.0, "--attain 1 should be a share between 0 and 1"),
    ],
)
def test_goals_that_are_none_are_one_sentence(goals, attain, message):
    with pytest.raises(GoalError) as error:
        parse_goals(goals, attain)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_survives_a_command_line():
    plan = CapacityPlan(["ttft_p95_ms=500"], 0.9, rates=[1.0, 2.0])
    assert CapacityPlan.read(plan.text()) == plan
    with pytest.raises(GoalError, match="cannot be read"):
        CapacityPlan.read('{"gaols": []}')


def test_shares_are_counted_by_goal_and_by_request():
    found = counted([answered(1.0), answered(2.0, ttft=0.6), answered(3.0, step=0.06), answered(4.0)])
    assert found.counts["ttft_p95_ms"] == (3, 4)
    assert found.counts["itl_p99_ms"] == (3, 4)  # of 40 tokens 10 were late: a quarter, of 4 requests
    assert found.counts["attain"] == (2, 4)
    assert found.goodput == pytest.approx(0.2)


def test_the_time_in_which_load_builds_up_does_not_count():
    assert counted([answered(0.5, ttft=2.0), answered(3.0)], (1.0, 10.0)).counts["ttft_p95_ms"] == (1, 1)


def test_a_failed_request_is_within_no_goal():
    failed = answered(1.0, error="HTTP 503")
    assert not within_limits(failed, GOALS)
    found = counted([failed, answered(2.0, arrivals=[], ended=2.1, error="HTTP 503")])
    assert found.counts["attain"] == (0, 2)
    assert found.counts["ttft_p95_ms"] == (1, 2)


def test_a_request_that_was_ended_before_any_limit_had_passed_does_not_count():
    early = answered(1.0, arrivals=[], ended=1.2, left=True)
    late = answered(1.0, arrivals=[], ended=1.9, left=True)
    assert counted([early]).requests == 0
    assert counted([late]).counts["ttft_p95_ms"] == (0, 1)


def test_requests_in_progress_are_counted_with_the_pauses_of_sessions():
    alone = [answered(2.0, ended=4.0), answered(4.0, ended=6.0)]
    session = [answered(2.0, ended=4.0, session=0), answered(8.0, ended=10.0, session=0, turn=1)]
    assert counted(alone).in_progress == pytest.approx(0.4)
    assert counted(session).in_progress == pytest.approx(0.8)


def test_a_probe_ends_early_only_far_above_the_capacity():
    late = [answered(n / 10, ttft=2.0) for n in range(40)]
    assert not clearly_too_fast(GOALS, late[:20], planned=100)
    assert clearly_too_fast(GOALS, late, planned=100)
    assert clearly_too_fast(GOALS, [], planned=100, waiting=40)
    assert not clearly_too_fast(GOALS, [answered(n / 10) for n in range(100)], planned=100)


def test_the_time_to_the_answer_counts_from_the_end_of_thinking():
    goals = parse_goals(["answer_p95_ms=500"])
    thought = answered(1.0, ttft=0.1, answer_at=1.9, thinking_tokens=5)
    assert not within_limits(thought, goals)
    assert within_limits(answered(1.0, ttft=0.1), goals)
    assert math.isinf(answered(1.0, thinking_tokens=11).answer_ttft)


def test_the_offered_rate_is_the_mean_of_all_traffic():
    def scenario(*traffic):
        return parse({"title": "t", "seconds": 20, "traffic": list(traffic)}, Path("s.toml"))

    steady = {"kind": "a", "prompts": "code", "rate": 2.0}
    rising = {"kind": "b", "prompts": "code", "rate": [[0, 0.0], [20, 4.0]]}
    assert offered_rate(scenario(steady, rising)) == pytest.approx(4.0)
    with pytest.raises(ScenarioError, match="a capacity search needs a rate"):
        offered_rate(scenario({"kind": "c", "prompts": "code", "trace": "t.txt"}))


def test_probes_at_low_rates_last_longer():
    plan = CapacityPlan(["ttft_p95_ms=500"], probe_seconds=10.0)
    assert [plan.seconds_at(rate) for rate in (5.0, 1.0, 0.1)] == [10.0, 20.0, 30.0]
