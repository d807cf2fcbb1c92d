from __future__ import annotations

import numpy as np
import pytest

from vllm_instant.tools.measure import server_metrics as m
from vllm_instant_loadtests.metric_series import MetricSeries
from vllm_instant_loadtests.request_tables import acceptance_length, request_tables
from vllm_instant_loadtests.run_recorder import MetricsSample, RecordedRequest

NO_METRICS = MetricSeries([])


def answered(due: float, itl: float = 0.02, tokens: int = 21, **more) -> RecordedRequest:
    arrivals = [(due + 0.1 + itl * n, n + 1) for n in range(tokens)]
    given = {"id": "", "server": "s", "kind": "a", "route": "chat", "sent": due + 0.002, "ended": arrivals[-1][0]}
    return RecordedRequest(**{**given, "due": due, "arrivals": arrivals, **more})


def tables(requests, metrics=NO_METRICS):
    return request_tables(requests, metrics, [(0.0, 10.0)])


def drafted(seed: int, refusals_cost_time: bool) -> list[RecordedRequest]:
    random = np.random.default_rng(seed)
    requests = []
    for number in range(60):
        accepted = int(random.integers(0, 16))
        steps = 21 - accepted
        pace = 0.03 * steps / 21 if refusals_cost_time else 0.02
        requests.append(answered(number / 10, pace * random.uniform(0.95, 1.05), id=f"{number}", accepted=accepted))
    return requests


def test_kinds_have_their_own_rows():
    first, second = tables([answered(0), answered(1), answered(2, itl=0.04, kind="b", prompt_tokens=7)]).kinds
    assert (first.name, first.requests, second.name, second.prompt_tokens) == ("a", 2, "b", 7)
    assert (first.itl_mean, second.itl_mean) == (pytest.approx(20), pytest.approx(40))
    assert first.tokens_per_second == pytest.approx(50)
    assert first.ttft_p50 == pytest.approx(100)


def test_turns_and_sessions():
    requests = [answered(0, session=0), answered(2, session=0, turn=1), answered(1, session=5)]
    found = tables([*requests, answered(3)])
    assert [(group.name, group.requests) for group in found.turns] == [("1", 2), ("2", 1)]
    assert found.sessions is not None
    assert (found.sessions.sessions, found.sessions.turns) == (2, 1.5)
    assert found.sessions.p99 == pytest.approx(2.5, abs=0.05)
    assert found.sessions.waiting == pytest.approx(0.15)


def test_requests_of_no_session_have_no_session_table():
    found = tables([answered(0)])
    assert found.sessions is None
    assert found.turns == []


def test_refused_drafts_explain_slow_answers_where_they_cost_time():
    effect = tables(drafted(0, refusals_cost_time=True)).acceptance
    assert effect is not None
    assert effect.correlation < -0.9
    assert effect.low[0] < effect.high[0]
    assert effect.low[1] > effect.high[1]
    assert all(one["refused"] for one in effect.slowest)


def test_refused_drafts_explain_nothing_where_they_cost_no_time():
    effect = tables(drafted(0, refusals_cost_time=False)).acceptance
    assert effect is not None
    assert abs(effect.correlation) < 0.4


def test_a_slow_answer_with_many_accepted_drafts_has_another_cause():
    slow = answered(7, itl=0.2, id="slow", accepted=15)
    effect = tables([*drafted(0, refusals_cost_time=True), slow]).acceptance
    assert effect is not None
    assert effect.slowest[0]["id"] == "slow"
    assert not effect.slowest[0]["refused"]


def test_without_reported_drafts_nothing_is_said_about_them():
    found = tables([answered(n / 10) for n in range(40)])
    assert found.acceptance is None
    assert np.isnan(found.kinds[0].acceptance_length)


def test_tokens_per_step():
    assert acceptance_length(answered(0, accepted=11)) == pytest.approx(2.1)


def test_the_prefix_hit_rate_is_that_of_the_run():
    readings = [(0.0, 50.0, 10.0), (5.0, 150.0, 40.0), (10.0, 250.0, 110.0)]
    samples = [
        MetricsSample("s", at, 0.01, {m.PREFIX_QUERIES: asked, m.PREFIX_HITS: hit}) for at, asked, hit in readings
    ]
    assert tables([answered(0)], MetricSeries(samples)).prefix_hit_rate == pytest.approx(0.5)


def test_planned_and_sent_times_are_compared():
    assert tables([answered(0), answered(1)]).late_ms["p50"] == pytest.approx(2.0)
