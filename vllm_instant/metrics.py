"""Prometheus metrics of the plugins, beside vLLM's own on ``/metrics``.

Names begin with ``vllm_instant:``, because vLLM unregisters all metrics with ``vllm:`` when it registers its own.
"""

from __future__ import annotations

from collections import Counter as Counted
from collections import defaultdict
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from vllm_instant.deployment.resolved import installed_plugin
from vllm_instant.interfaces.deployment import Deployment

PREFIX = "vllm_instant:"

_SPECULATION = {
    "budgeted": ("draft_tokens_budgeted", "Draft budgets of the speculation policy, in draft tokens."),
    "proposed": ("draft_tokens_proposed", "Draft tokens that were verified."),
    "accepted": ("draft_tokens_accepted", "Draft tokens that were accepted."),
    "steps": ("planned_steps", "Engine steps with draft budgets of the speculation policy."),
    "steps_without_drafting": ("planned_steps_without_drafting", "Planned steps in which all draft budgets were 0."),
    "full_graph_steps": ("full_graph_steps", "Decoding steps that ran as one CUDA graph."),
    "piecewise_steps": ("piecewise_steps", "Decoding steps outside of such graphs, on devices that have them."),
}

_ADMISSION = {
    "started": ("requests_started", "Requests that left the queue for the first time."),
    "started_early": ("requests_started_early", "Requests that started while an older one waited."),
    "preemptions": ("requests_preempted", "Number of times that a running request lost its KV blocks."),
}

_EXPERTS = {
    "layer_steps": ("expert_layer_steps_counted", "Number of layers times decoding steps whose experts were counted."),
    "native_experts": ("experts_native", "Distinct experts in the model's own routing, in counted steps."),
    "routed_experts": ("experts_routed", "Distinct experts that were used, in counted steps."),
    "native_mass": ("expert_mass_native", "Router weights of the model's own selection, in counted steps."),
    "routed_mass": ("expert_mass_routed", "Router weights of the experts that were used, in counted steps."),
    "kl_tokens": ("expert_shadow_tokens", "Tokens whose distribution was compared with that of a reference pass."),
    "kl": ("expert_shadow_kl_nats", "Sum of the KL divergences of these distributions, in nats."),
}


class InstantMetrics:
    """Prometheus metrics, updated with totals of the engine cores.

    Args:
        deployment: The served deployment, whose plugins ``vllm_instant:plugin_info`` lists.
        registry: Registry of the metrics; by default that of the process.

    """

    def __init__(self, deployment: Deployment, registry: CollectorRegistry = REGISTRY) -> None:
        info = Gauge(
            f"{PREFIX}plugin_info",
            "Plugins of this server; always 1.",
            ["slot", "plugin", "distribution", "version", "lossy"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        for slot in deployment.slots:
            found = installed_plugin(deployment, slot)
            lossy = "yes" if found.plugin.lossy else "no"
            info.labels(slot, found.plugin.name, found.distribution, found.version, lossy).set(1)
        self._speculation = {
            field: Counter(f"{PREFIX}{name}", text, ["engine"], registry=registry)
            for field, (name, text) in _SPECULATION.items()
        }
        self._admission = {
            field: Counter(f"{PREFIX}{name}", text, ["engine"], registry=registry)
            for field, (name, text) in _ADMISSION.items()
        }
        self._measures = Gauge(
            f"{PREFIX}batching_measure",
            "Gauges of the scheduling policy.",
            ["engine", "measure"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._experts = {
            field: Counter(f"{PREFIX}{name}", text, ["engine"], registry=registry)
            for field, (name, text) in _EXPERTS.items()
        }
        self._expert_measures = Gauge(
            f"{PREFIX}experts_measure",
            "Gauges of the experts plugin, for example its budget and its quality gate.",
            ["engine", "measure"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._failures = Counter(
            f"{PREFIX}plugin_failures",
            "Number of times that a plugin raised while serving; the first one disables it.",
            ["engine", "slot", "plugin", "hook"],
            registry=registry,
        )
        self._findings = Gauge(
            f"{PREFIX}deployment_findings",
            "Number of limits of a slot in this deployment; the log states them at start.",
            ["engine", "slot", "verdict"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._seen: dict[tuple[str, ...], float] = defaultdict(float)

    def update(self, engine: str, totals: dict[str, Any]) -> None:
        """Increase the counters to an engine's totals; a smaller total means that the engine was restarted."""
        for slot, counters in (("speculation", self._speculation), ("batching", self._admission)):
            if totals.get(slot) is not None:
                for field, counter in counters.items():
                    counter.labels(engine).inc(self._increase((engine, field), totals[slot][field]))
        for measure, value in (totals.get("batching") or {}).get("measures", {}).items():
            self._measures.labels(engine, measure).set(value)
        experts = totals.get("experts")
        if experts is not None:
            for field, counter in self._experts.items():
                counter.labels(engine).inc(self._increase((engine, f"experts {field}"), experts["totals"][field]))
            for measure, value in experts["measures"].items():
                self._expert_measures.labels(engine, measure).set(value)
        findings = Counted((found["slot"], found["verdict"]) for found in totals.get("findings", ()))
        for (slot, verdict), count in findings.items():
            self._findings.labels(engine, slot, verdict).set(count)
        for failure in totals.get("failures", ()):
            labels = (engine, failure["slot"], failure["plugin"], failure["hook"])
            self._failures.labels(*labels).inc(self._increase(labels, failure["count"]))

    def _increase(self, key: tuple[str, ...], total: float) -> float:
        before, self._seen[key] = self._seen[key], total
        return total - before if total >= before else total
