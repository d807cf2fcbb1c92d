"""The server's own numbers, beside vLLM's on ``/metrics``.

Names begin with ``vllm_instant:``; vLLM unregisters everything that begins with ``vllm:`` when it registers its own.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from vllm_instant.deployment.resolved import installed_plugin
from vllm_instant.interfaces.deployment import Deployment

PREFIX = "vllm_instant:"

_SPECULATION = {
    "budgeted": ("draft_tokens_budgeted", "Draft tokens that the speculation policy granted."),
    "proposed": ("draft_tokens_proposed", "Draft tokens that were sent to verification."),
    "accepted": ("draft_tokens_accepted", "Draft tokens that verification kept."),
    "steps": ("planned_steps", "Engine steps that the speculation policy planned."),
    "steps_without_drafting": ("planned_steps_without_drafting", "Planned steps in which nothing was drafted."),
}

_BATCHING = {
    "started": ("requests_started", "Requests that left the queue for the first time."),
    "started_early": ("requests_started_early", "Requests that started while an older one waited."),
    "preemptions": ("requests_preempted", "Times that a running request lost its KV blocks."),
}

_EXPERTS = {
    "layer_steps": ("expert_layer_steps_counted", "Layers times decoding steps whose experts were counted."),
    "native_experts": ("experts_native", "Distinct experts that the model's own routing would have used in those."),
    "routed_experts": ("experts_routed", "Distinct experts that were used in those."),
    "native_mass": ("expert_mass_native", "Router weights of the model's own picks in those."),
    "routed_mass": ("expert_mass_routed", "Router weights of what was picked in those."),
    "kl_tokens": ("expert_shadow_tokens", "Tokens whose distribution was compared with that of a shadow pass."),
    "kl": ("expert_shadow_kl_nats", "Sum of their divergences."),
}


class InstantMetrics:
    """Prometheus metrics fed with totals from the engine cores.

    Args:
        deployment: what is served; its plugins are shown as ``vllm_instant:plugin_info``.
        registry: where the metrics live; the process's own by default.

    """

    def __init__(self, deployment: Deployment, registry: CollectorRegistry = REGISTRY) -> None:
        info = Gauge(
            f"{PREFIX}plugin_info",
            "Plugins that this server was started with; always 1.",
            ["slot", "plugin", "distribution", "version", "lossy"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        for slot in deployment.slots:
            offer = installed_plugin(deployment, slot)
            info.labels(
                slot, offer.plugin.name, offer.distribution, offer.version, "yes" if offer.plugin.lossy else "no"
            ).set(1)
        self._speculation = {
            field: Counter(f"{PREFIX}{name}", text, ["engine"], registry=registry)
            for field, (name, text) in _SPECULATION.items()
        }
        self._batching = {
            field: Counter(f"{PREFIX}{name}", text, ["engine"], registry=registry)
            for field, (name, text) in _BATCHING.items()
        }
        self._measures = Gauge(
            f"{PREFIX}batching_measure",
            "What the batching policy measures of itself.",
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
            "What the experts plugin says of itself: its budget and its gate, for example.",
            ["engine", "measure"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._failures = Counter(
            f"{PREFIX}plugin_failures",
            "Times that a plugin raised while serving (it is disabled at the first).",
            ["engine", "slot", "plugin", "hook"],
            registry=registry,
        )
        self._seen: dict[tuple[str, ...], float] = defaultdict(float)

    def update(self, engine: str, totals: dict[str, Any]) -> None:
        """Raise the counters to an engine's totals; a total that fell means that the engine was restarted."""
        for slot, counters in (("speculation", self._speculation), ("batching", self._batching)):
            if totals.get(slot) is not None:
                for field, counter in counters.items():
                    counter.labels(engine).inc(self._growth((engine, field), totals[slot][field]))
        for measure, value in (totals.get("batching") or {}).get("measures", {}).items():
            self._measures.labels(engine, measure).set(value)
        experts = totals.get("experts")
        if experts is not None:
            for field, counter in self._experts.items():
                counter.labels(engine).inc(self._growth((engine, f"experts {field}"), experts["totals"][field]))
            for measure, value in experts["measures"].items():
                self._expert_measures.labels(engine, measure).set(value)
        for failure in totals.get("failures", ()):
            labels = (engine, failure["slot"], failure["plugin"], failure["hook"])
            self._failures.labels(*labels).inc(self._growth(labels, failure["count"]))

    def _growth(self, key: tuple[str, ...], total: float) -> float:
        before, self._seen[key] = self._seen[key], total
        return total - before if total >= before else total
