"""Results next to an earlier run's, as JUnit XML, and in an OpenTelemetry collector."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from queue_servers import probe

from vllm_instant.tools.html.plots import LinePlot, PlotLine
from vllm_instant_loadtests import capacity_report, otlp
from vllm_instant_loadtests.analysis import analyse_run
from vllm_instant_loadtests.capacity import CapacityAnalysis, CapacityPlan, _server, analyse_capacity
from vllm_instant_loadtests.capacity_goals import ProbeResult
from vllm_instant_loadtests.capacity_search import CapacitySearch, compare_capacity
from vllm_instant_loadtests.compare import BaselineError, compare_runs
from vllm_instant_loadtests.report import write_junit
from vllm_instant_loadtests.run_recorder import RecordedRequest, RecordedRun
from vllm_instant_loadtests.simulated import SimulatedEngine, SimulatedTraffic, simulate_run


def junit(folder: Path) -> ElementTree.Element:
    return ElementTree.fromstring((folder / "junit.xml").read_text())  # noqa: S314  written by the test


ABOUT = {"scenario": {"name": "steady"}, "seed": "0", "servers": [{"name": "ours"}]}


def recorded(step: float, seed: int = 4) -> RecordedRun:
    load = SimulatedTraffic(rate=2.0, answer=(80, 80), prompt=(50, 50))
    run = simulate_run(80, load=load, engine=SimulatedEngine(step=step), seed=seed)
    requests = sorted(run.requests, key=lambda request: request.due)
    named = [replace(request, server="ours", number=n, segment=n // 20) for n, request in enumerate(requests)]
    return RecordedRun(ABOUT, named)


@pytest.fixture(scope="module")
def before():
    return recorded(0.02)


def test_a_slower_run_is_worse_than_the_baseline(before, tmp_path):
    analysis = analyse_run(recorded(0.03), baseline=before)
    assert not analysis.met
    assert {row.name: row.verdict for row in analysis.since[0].rows}["ITL p50"] == "worse"
    write_junit(analysis, tmp_path / "junit.xml")
    suite = junit(tmp_path).findall("testsuite")[-1]
    assert (suite.get("name"), suite.get("failures")) == ("steady: since the baseline", "1")


def test_the_same_again_is_not_worse(before, tmp_path):
    analysis = analyse_run(recorded(0.02), baseline=before)
    assert analysis.met
    write_junit(analysis, tmp_path / "junit.xml")
    assert not junit(tmp_path).findall(".//failure")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"scenario": {"name": "burst"}}, "the run of --baseline has scenario 'burst', not 'steady'"),
        ({"seed": "1"}, "the run of --baseline has seed '1', not '0'"),
    ],
)
def test_another_run_cannot_be_a_baseline(before, about, message):
    with pytest.raises(BaselineError, match=message):
        compare_runs(before, replace(before, about={**ABOUT, **about}))


def test_a_baseline_needs_a_server_of_the_same_name(before):
    other = replace(before, requests=[replace(request, server="x") for request in before.requests])
    with pytest.raises(BaselineError, match="has no server called ours"):
        compare_runs(before, other)


class Collector:
    def __init__(self, status: int) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def collector(request: pytest.FixtureRequest) -> Iterator[Collector]:
    found = Collector(getattr(request, "param", 200))
    thread = threading.Thread(target=found.server.serve_forever, daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()


def test_results_reach_a_collector(before, collector):
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    analysis = analyse_run(before)
    sent = otlp.send(otlp.run_measurements(analysis), collector.url, "steady")
    points = {}
    for body in collector.bodies:
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.gauge.data_points:
                        names = {entry.key: entry.value.string_value for entry in point.attributes}
                        points[metric.name, names.get("metric"), names.get("statistic")] = point.as_double, names
    value, names = points["vllm_instant.loadtest.latency", "itl", "p50"]
    assert value == pytest.approx(analysis.servers[0].percentiles["itl"]["p50"] / 1e3)
    assert (names["server"], names["scenario"]) == ("ours", "steady")
    assert len(points) == sent


@pytest.mark.parametrize("collector", [404], indirect=True)
def test_a_collector_that_refuses_is_one_sentence(before, collector):
    with pytest.raises(otlp.ExportError, match="did not take the results: is it an OTLP collector over HTTP"):
        otlp.send(otlp.run_measurements(analyse_run(before)), collector.url, "steady")


@pytest.fixture(scope="module")
def found_capacity() -> CapacityAnalysis:
    plan = CapacityPlan(["e2e_p95_ms=500"], max_probes=10)
    random = np.random.default_rng(0)
    searches = {name: CapacitySearch(plan.share_goals, 12.0, plan.limits) for name in ("a", "b & co")}
    for name, search in searches.items():
        while not search.finished:
            search.observe(probe(name, search.next_rate(), 30.0, plan.share_goals, random, 60.0))
    servers = [_server(name, search) for name, search in searches.items()]
    return CapacityAnalysis({"scenario": {"name": "s", "title": "S"}}, plan, servers, compare_capacity(searches))


def test_the_capacity_page_shows_every_probe_and_the_knee(found_capacity, tmp_path):
    capacity_report.write(found_capacity, tmp_path)
    page = (tmp_path / "capacity.html").read_text()
    assert page.count("<svg") == 3
    assert "b &amp; co carries" in page
    assert "b & co carries" not in page
    for server in found_capacity.servers:
        assert server.bounded
        for one in server.probes:
            assert f'<td class="number">{one.requests}</td>' in page
    suite = junit(tmp_path)[0]
    assert len(suite) == 3


def test_a_capacity_reaches_a_collector(found_capacity, collector):
    assert otlp.send(otlp.capacity_measurements(found_capacity), collector.url, "s") == 6


def test_dots_are_not_connected():
    drawn = [
        str(LinePlot("t", "x", [PlotLine("", [1, 2, 3], [1, 3, 2], dots=dots)]).svg()).count("fill: none")
        for dots in (False, True)
    ]
    assert drawn[0] == drawn[1] + 1


def test_goals_that_held_nowhere_and_everywhere_are_said():
    plan = CapacityPlan(["ttft_p95_ms=500"])
    sentences = []
    for good in (10.0, 100.0):
        search = CapacitySearch(plan.share_goals, 1.0, plan.limits)
        for _ in range(4):
            rate = search.next_rate()
            counts = {goal.name: (good, 100.0) for goal in plan.share_goals}
            search.observe(ProbeResult("s", rate, 20.0, 100, counts, good / 20, 1.0))
        sentences.append((_server("s", search).sentence, rate))
    assert sentences[0][0].endswith("no capacity found in 4 probes; the goals held at no rate")
    assert sentences[1][0].endswith(f"the goals held up to {max(p.rate for p in search.probes):.3g} per second")


def test_a_capacity_of_sessions_counts_sessions():
    goals = CapacityPlan(["ttft_p95_ms=500"], rates=[1.0]).goals
    segment = {"server": "s", "number": 0, "rate": 1.0, "measured": [0.0, 10.0], "stopped": False}
    about = {"servers": [{"name": "s"}], "segments": [segment], "capacity": {"goals": goals}, "start_rate": 1.0}
    request = RecordedRequest("", "s", "a", "chat", 1.0, 1.0, [(1.1, 1), (1.2, 2)], 1.2, segment=0, session=0)
    for session, unit in ((0, "sessions"), (None, "requests")):
        (found,) = analyse_capacity(RecordedRun(about, [replace(request, session=session)])).servers
        assert (found.unit, found.probes[0].requests) == (unit, 1)
