"""Counters from totals."""

from prometheus_client import CollectorRegistry, generate_latest

from vllm_instant.deployment.settings import resolve
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.metrics import InstantMetrics


def _totals(proposed, failures=()):
    speculation = {"budgeted": 9, "proposed": proposed, "accepted": 1, "steps": 3, "steps_without_drafting": 0}
    speculation |= {"full_graph_steps": 2, "piecewise_steps": 1}
    return {"speculation": speculation, "failures": list(failures)}


def test_totals_become_counters_per_engine():
    registry = CollectorRegistry()
    metrics = InstantMetrics(resolve(), registry)
    metrics.update("0", _totals(5))
    metrics.update("0", _totals(8))
    metrics.update("1", _totals(2))
    assert registry.get_sample_value("vllm_instant:draft_tokens_proposed_total", {"engine": "0"}) == 8
    assert registry.get_sample_value("vllm_instant:draft_tokens_proposed_total", {"engine": "1"}) == 2


def test_counters_and_gauges_of_a_scheduling_policy():
    registry = CollectorRegistry()
    metrics = InstantMetrics(resolve(), registry)
    for started, error in ((2, 0.5), (7, 0.1)):
        counts = {"started": started, "started_early": 1, "preemptions": 0, "measures": {"some_error": error}}
        metrics.update("0", {"speculation": None, "batching": counts, "failures": []})
    assert registry.get_sample_value("vllm_instant:requests_started_total", {"engine": "0"}) == 7
    assert registry.get_sample_value("vllm_instant:requests_started_early_total", {"engine": "0"}) == 1
    labels = {"engine": "0", "measure": "some_error"}
    assert registry.get_sample_value("vllm_instant:batching_measure", labels) == 0.1


def test_counters_and_gauges_of_an_experts_plugin():
    registry = CollectorRegistry()
    metrics = InstantMetrics(resolve(), registry)
    fields = ("layer_steps", "native_experts", "routed_experts", "native_mass", "routed_mass", "kl_tokens", "kl")
    for factor in (1, 3):
        totals = {field: factor * (number + 0.5) for number, field in enumerate(fields)}
        experts = {"totals": totals, "measures": {"budget": 0.25 * factor}}
        metrics.update("0", {"speculation": None, "failures": [], "experts": experts})
    found = registry.get_sample_value
    assert found("vllm_instant:experts_routed_total", {"engine": "0"}) == 7.5
    assert found("vllm_instant:expert_shadow_kl_nats_total", {"engine": "0"}) == 19.5
    assert found("vllm_instant:experts_measure", {"engine": "0", "measure": "budget"}) == 0.75


def test_counters_continue_after_a_restart_of_the_engine():
    registry = CollectorRegistry()
    metrics = InstantMetrics(resolve(), registry)
    for total in (5, 2, 3):
        metrics.update("0", _totals(total))
    assert registry.get_sample_value("vllm_instant:draft_tokens_proposed_total", {"engine": "0"}) == 8


def test_failures_are_labelled():
    registry = CollectorRegistry()
    metrics = InstantMetrics(resolve(), registry)
    failure = {"slot": "drafter", "plugin": "x", "hook": "propose", "count": 1}
    metrics.update("0", _totals(1, [failure]))
    metrics.update("0", {"speculation": None, "failures": [failure]})
    labels = {"engine": "0", "slot": "drafter", "plugin": "x", "hook": "propose"}
    assert registry.get_sample_value("vllm_instant:plugin_failures_total", labels) == 1


def test_every_plugin_of_the_deployment_is_listed():
    registry = CollectorRegistry()
    InstantMetrics(resolve(), registry)
    text = generate_latest(registry).decode()
    assert 'vllm_instant:plugin_info{distribution="vllm-instant",lossy="no",plugin="goodput",slot="speculation"' in text
    assert text.count("vllm_instant:plugin_info{") == len(SLOTS)
