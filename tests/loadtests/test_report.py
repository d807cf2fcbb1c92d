"""Goals, A/B, and what reports say."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from vllm_instant_loadtests import causes, compare
from vllm_instant_loadtests.analysis import analyse_run
from vllm_instant_loadtests.goals import LoadTestGoals
from vllm_instant_loadtests.report import write_html, write_json, write_junit
from vllm_instant_loadtests.run_recorder import Disturbance, RecordedRun
from vllm_instant_loadtests.simulated import SERVER, SimulatedEngine, SimulatedTraffic, simulate_run


def _named(run, name):
    """The run of another server, its requests numbered."""
    requests = sorted(run.requests, key=lambda request: request.due)
    return [replace(request, server=name, number=n, segment=n // 30) for n, request in enumerate(requests)]


def _with_baseline(step):
    """Two servers with the same requests; the second one's steps take ``step`` seconds."""
    load = SimulatedTraffic(rate=2.0, answer=(80, 80), prompt=(50, 50))
    one = simulate_run(90, load=load, seed=4)
    other = simulate_run(90, load=load, engine=SimulatedEngine(step=step), seed=4)
    requests = _named(one, "baseline") + _named(other, "ours")
    return RecordedRun({"servers": [{"name": "baseline"}, {"name": "ours"}]}, requests)


@pytest.fixture(scope="module")
def stopped():
    run = simulate_run(
        60,
        [Disturbance(SERVER, causes.STOPPED, 30.0, 32.0, "engine core <&>")],
        load=SimulatedTraffic(rate=3.0),
        seed=5,
    )
    run.about["goals"] = {"itl_p99_ms": 1.0, "error_rate": 0.0, "spikes": 0}
    return run, analyse_run(run)


def test_goals_are_checked_for_every_server(stopped):
    _, analysis = stopped
    met = {checked.goal: checked.met for checked in analysis.goals}
    assert met == {"itl_p99_ms": False, "error_rate": True, "spikes": False}
    assert not analysis.met
    assert analyse_run(stopped[0], LoadTestGoals(error_rate=0.5)).met


def test_what_was_not_measured_is_not_met():
    analysis = analyse_run(simulate_run(8, seed=1), LoadTestGoals(spikes=3))
    assert [(checked.found, checked.met) for checked in analysis.goals] == [(None, False)]
    assert "too little data" in analysis.goals[0].sentence


@pytest.mark.parametrize("goal", [{"ttft_p98_ms": 3}, {"itl_p99_ms": -1}, {"error_rate": 2}, {"spikes": 0.5}])
def test_goals_that_make_no_sense_are_refused(goal):
    with pytest.raises(ValidationError):
        LoadTestGoals(**goal)


def test_a_faster_server_is_better_and_the_same_one_makes_no_difference():
    faster = compare.compare_servers(_with_baseline(0.012), "ours", "baseline")
    same = compare.compare_servers(_with_baseline(0.0202), "ours", "baseline")
    rows = {row.name: row for row in faster.rows}
    assert rows["ITL mean"].verdict == "better"
    assert rows["ITL mean"].effect.mean == pytest.approx(0.7, abs=0.15)
    assert rows["E2E p50"].verdict == "better"
    assert {row.verdict for row in same.rows} <= {"same", "undecided"}
    assert any(row.rounds_to_decide for row in same.rows if row.verdict == "undecided") or {
        row.verdict for row in same.rows
    } == {"same"}
    assert faster.pairs == 180
    assert "better, 0 worse" in faster.verdict


def test_pairs_that_one_server_failed_are_counted_and_not_compared():
    run = _with_baseline(0.02)
    broken = [replace(r, error="HTTP 500") if r.server == "ours" and r.number < 7 else r for r in run.requests]
    comparison = compare.compare_servers(RecordedRun(run.about, broken), "ours", "baseline")
    assert comparison.failed == (7, 0)
    assert comparison.pairs == 173


def test_a_run_of_two_servers_compares_the_later_with_the_earlier():
    analysis = analyse_run(_with_baseline(0.012))
    [comparison] = analysis.comparisons
    assert (comparison.ours, comparison.theirs) == ("ours", "baseline")


def test_html_has_everything_and_nothing_from_elsewhere(stopped, tmp_path):
    run, analysis = stopped
    write_html(analysis, run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "server stopped" in page
    assert "no request received a token for" in page
    assert "missed" in page
    assert page.count("<svg") >= 6
    assert "<title>server stopped" in page
    assert "engine core &lt;&amp;&gt;" in page
    for outside in ("<script", "http-equiv", "src=", "@import", "<link"):
        assert outside not in page


def test_json_is_json_without_nan(stopped, tmp_path):
    _, analysis = stopped
    write_json(analysis, tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    plain = json.loads(text)
    assert "NaN" not in text
    assert plain["met"] is False
    [spike] = plain["servers"][0]["spikes"]
    assert spike["cause"] == causes.STOPPED
    assert {"metric", "began", "ended", "evidence", "alternatives", "rises", "score"} <= spike.keys()
    assert {"baseline_ms", "value_ms", "ratio", "p"} <= spike["rises"][0].keys()


def test_junit_fails_what_is_missed(stopped, tmp_path):
    _, analysis = stopped
    write_junit(analysis, tmp_path / "junit.xml")
    [suite] = ElementTree.parse(tmp_path / "junit.xml").getroot()  # noqa: S314 - our own file
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed[:2] == ["itl_p99_ms", "spikes"]
    assert failed[2].startswith("server stopped at ")
    assert int(suite.get("failures")) == len(failed) == 3
    assert int(suite.get("tests")) == 4


def test_spikes_are_failures_only_where_their_number_is_a_goal(stopped, tmp_path):
    run, _ = stopped
    write_junit(analyse_run(run, LoadTestGoals(error_rate=0.0)), tmp_path / "junit.xml")
    [suite] = ElementTree.parse(tmp_path / "junit.xml").getroot()  # noqa: S314 - our own file
    assert suite.get("failures") == "0"
    assert any("server stopped" in case.get("name") for case in suite)


def test_summary_says_spikes_evidence_and_goals(stopped):
    text = stopped[1].summary()
    assert "server stopped" in text
    assert "MISSED: simulated: itl_p99_ms" in text
    assert "met: simulated: error_rate" in text
