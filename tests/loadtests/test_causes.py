"""Each cause is named for what it does, with evidence that says so."""

from dataclasses import replace

import pytest

from vllm_instant.tools.measure import server_metrics as m
from vllm_instant_loadtests import causes, host_causes
from vllm_instant_loadtests.analysis import analyse_run
from vllm_instant_loadtests.escalation_cause import ESCALATION
from vllm_instant_loadtests.metric_series import MetricSeries
from vllm_instant_loadtests.run_recorder import DecisionSample, Disturbance, MetricsSample, RecordedRun
from vllm_instant_loadtests.simulated import SERVER, SimulatedEngine, SimulatedTraffic, simulate_run

CASES = {
    causes.ACCEPTANCE: (
        5.0,
        {"engine": SimulatedEngine(draft_tokens=5), "load": SimulatedTraffic(rate=1.5)},
        "of draft tokens accepted",
    ),
    causes.BATCH: (4.0, {"load": SimulatedTraffic(rate=1.5)}, "requests ran at once"),
    causes.PREFILL: (4.0, {}, "long prompts were prefilled"),
    causes.MEMORY: (4.0, {"engine": SimulatedEngine(kv_tokens=2500)}, "requests were preempted"),
    causes.QUEUEING: (
        1.0,
        {"engine": SimulatedEngine(seats=8), "load": SimulatedTraffic(rate=1.5)},
        "requests waited for admission",
    ),
    causes.CLIENT: (1.6, {}, "the load generator's own timers were"),
    causes.STOPPED: (1.6, {}, "no request received a token for"),
    causes.DISCONNECTS: (4.0, {}, "new clients hung up"),
    causes.COMPILE: (1.6, {}, "for the first time"),
    ESCALATION: (4.0, {}, "the deep end answered"),
}


def _disturbed(cause, seed, seconds=60):
    length, setup, _ = CASES[cause]
    return simulate_run(seconds, [Disturbance(SERVER, cause, 30.0, 30.0 + length)], seed=seed, **setup)


@pytest.mark.parametrize("cause", CASES)
def test_named_in_at_least_four_of_five_runs(cause):
    named = 0
    for seed in range(5):
        run = _disturbed(cause, seed)
        spikes = [spike for spike in analyse_run(run).spikes if spike.began < 42 and spike.ended > 30]
        right = [spike for spike in spikes if spike.cause == cause]
        named += bool(right)
        for spike in right:
            assert CASES[cause][2] in " ".join(spike.evidence)
    assert named >= 4


MACHINE = {
    host_causes.QUOTA: "the server's control group was throttled for",
    host_causes.STEAL: "the hypervisor took",
    host_causes.PAGING: "major page faults per second",
    host_causes.NEIGHBOUR: "other processes used",
    host_causes.GPU: "MHz before",
}


@pytest.mark.parametrize("slower", [1.6, 2.5])
def test_causes_of_the_machine_are_told_apart(slower):
    right = found = 0
    for number, (cause, evidence) in enumerate(MACHINE.items()):
        event = Disturbance(SERVER, cause, 30.0, 36.0)
        run = simulate_run(50, [event], slower=slower, seed=100 + number)
        spikes = [spike for spike in analyse_run(run).spikes if spike.began < 40 and spike.ended > 30]
        named = [spike for spike in spikes if spike.cause == cause]
        assert all(evidence in " ".join(spike.evidence) for spike in named)
        found, right = found + len(spikes), right + len(named)
    assert right == found >= 4


def test_a_slow_server_on_a_quiet_machine_is_not_blamed_on_the_machine():
    for seed in range(2):
        run = simulate_run(50, [Disturbance(SERVER, causes.UNKNOWN, 30.0, 36.0)], slower=2.0, seed=seed)
        assert not {spike.cause for spike in analyse_run(run).spikes} & set(host_causes.HOST_CAUSES)


def test_attribution_works_without_any_metrics():
    """A proxy in front of the server may hide them; what requests show is still enough for some causes."""
    run = _disturbed(causes.PREFILL, 1)
    blind = RecordedRun(run.about, run.requests, [], [], run.client, run.events)
    assert causes.PREFILL in [spike.cause for spike in analyse_run(blind).spikes]


def test_prompt_lengths_from_the_metrics_where_requests_do_not_say():
    run = _disturbed(causes.PREFILL, 2)
    requests = [replace(request, prompt_tokens=None) for request in run.requests]
    told = RecordedRun(run.about, requests, run.samples, [], run.client, run.events)
    found = [finding for spike in analyse_run(told).spikes for finding in spike.findings]
    lines = [line for finding in found if finding.cause == causes.PREFILL for line in finding.evidence]
    assert any("prompt tokens per second were prefilled" in line for line in lines)


def test_what_nothing_explains_is_unknown():
    run = simulate_run(
        60, [Disturbance(SERVER, causes.UNKNOWN, 30.0, 36.0)], slower=2.5, load=SimulatedTraffic(rate=1.0), seed=2
    )
    assert [spike.cause for spike in analyse_run(run).spikes] == [causes.UNKNOWN]


def test_a_sleeping_load_generator_is_not_taken_for_a_stopped_server():
    run = _disturbed(causes.CLIENT, 7)
    [spike] = [spike for spike in analyse_run(run).spikes if spike.began < 33 and spike.ended > 30]
    by_cause = {finding.cause: finding.score for finding in spike.findings}
    assert by_cause[causes.CLIENT] > 0.7
    assert by_cause[causes.STOPPED] < 0.2


def test_counters_survive_restarts_and_gauges_are_read_where_they_are_nearest():
    samples = [
        MetricsSample("s", float(at), 0.01, {m.PREEMPTIONS: total, m.RUNNING: running})
        for at, total, running in [(0, 5, 1), (1, 7, 2), (2, 0, 8), (3, 4, 3)]
    ]
    meters = MetricSeries(samples[::-1])
    assert meters.growth(m.PREEMPTIONS, [(0.0, 1.0)]) == pytest.approx(2)
    # It fell: the server was started again, and counts from 0.
    assert meters.growth(m.PREEMPTIONS, [(0.0, 3.0)]) == pytest.approx(6)
    assert meters.rate(m.PREEMPTIONS, [(2.0, 2.5)]) == pytest.approx(4)
    assert meters.gauge(m.RUNNING, [(0.5, 2.5)]) == pytest.approx(5)
    assert meters.gauge(m.RUNNING, [(0.5, 2.5)], at_most=True) == 8
    assert meters.gauge(m.RUNNING, [(1.9, 1.95)]) == 8
    assert meters.unanswered((0.2, 0.3)) == pytest.approx(1.0)
    assert not meters.has(m.DRAFTED)


def test_a_decision_trace_adds_its_line():
    run = _disturbed(causes.STOPPED, 1)
    outcome = {"tokens": 8, "drafted": 6, "accepted": 4, "milliseconds": 21.0}
    steps = [DecisionSample(SERVER, at / 2, {"step": at, "outcome": outcome}) for at in range(120)]
    traced = RecordedRun(run.about, run.requests, run.samples, steps, run.client, run.events)
    [spike] = [spike for spike in analyse_run(traced).spikes if spike.began < 33 and spike.ended > 30]
    assert spike.evidence[-1].startswith("decision trace: 6.0 draft tokens per step and 4.0 accepted")
