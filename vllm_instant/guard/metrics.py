"""Prometheus metrics of the guard."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from vllm_instant.metrics import PREFIX

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0)


class GuardMetrics:
    """Metrics of one API server; those of several servers of one deployment add up.

    Args:
        plugin: Name of the plugin.
        registry: Registry of the metrics; by default that of the process.

    """

    def __init__(self, plugin: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._plugin = plugin
        self._delay = Histogram(
            f"{PREFIX}guard_delay_seconds",
            "Time for which the oldest token of a part of an answer was withheld.",
            ["plugin"],
            buckets=_SECONDS,
            registry=registry,
        ).labels(plugin)
        self._stopped = Counter(
            f"{PREFIX}guard_stopped",
            "Answers that the guard ended; tier late or failed: because it gave no verdict.",
            ["plugin", "tier", "side"],
            registry=registry,
        )
        self._replaced = Counter(
            f"{PREFIX}guard_replaced_spans", "Spans that were replaced.", ["plugin", "tier"], registry=registry
        )
        self._unjudged = Counter(
            f"{PREFIX}guard_released_unjudged_tokens",
            "Tokens that were released without a verdict.",
            ["plugin"],
            registry=registry,
        ).labels(plugin)
        self._judged = Counter(
            f"{PREFIX}guard_texts", "Prompts and answers that were judged.", ["plugin", "side"], registry=registry
        )
        self._measures = Gauge(
            f"{PREFIX}guard_measure",
            "Gauges of the guard plugin.",
            ["measure"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )

    def begun(self, side: str) -> None:
        self._judged.labels(self._plugin, side).inc()

    def released(self, delay: float, num_unjudged: int) -> None:
        self._delay.observe(delay)
        if num_unjudged:
            self._unjudged.inc(num_unjudged)

    def stopped(self, tier: str, side: str) -> None:
        self._stopped.labels(self._plugin, tier or self._plugin, side).inc()

    def replaced(self, tier: str, count: int) -> None:
        self._replaced.labels(self._plugin, tier or self._plugin).inc(count)

    def measure(self, name: str, value: float) -> None:
        self._measures.labels(name).set(value)
