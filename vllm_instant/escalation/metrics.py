"""Prometheus metrics of the escalation."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from vllm_instant.metrics import PREFIX

_DECISION_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_ANSWER_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class EscalationMetrics:
    """Metrics of one API server; those of several servers of one deployment add up.

    Args:
        plugin: Name of the plugin.
        registry: Registry of the metrics; by default that of the process.

    """

    def __init__(self, plugin: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._requests = Counter(
            f"{PREFIX}escalation_requests",
            "Requests by the end that was chosen and the end that answered; they differ where the deep server failed.",
            ["plugin", "chosen", "answered_by"],
            registry=registry,
        )
        self._plugin = plugin
        self._decision = Histogram(
            f"{PREFIX}escalation_decision_seconds",
            "Time until the end was chosen.",
            ["plugin"],
            buckets=_DECISION_SECONDS,
            registry=registry,
        ).labels(plugin)
        self._first_part = Histogram(
            f"{PREFIX}escalation_first_part_seconds",
            "Time from the request to the first part of its answer, by the end that answered.",
            ["answered_by"],
            buckets=_ANSWER_SECONDS,
            registry=registry,
        )
        self._answer = Histogram(
            f"{PREFIX}escalation_answer_seconds",
            "Time from the request to the end of its answer, by the end that answered.",
            ["answered_by"],
            buckets=_ANSWER_SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            f"{PREFIX}escalation_tokens",
            "Tokens that the answers themselves report (usage), by the end that answered: the cost of each end.",
            ["answered_by", "kind"],
            registry=registry,
        )
        self._failures = Counter(
            f"{PREFIX}escalation_deep_failures",
            "Requests that the deep server did not answer, by kind.",
            ["kind"],
            registry=registry,
        )
        self._is_down = Gauge(
            f"{PREFIX}escalation_deep_down",
            "Whether the deep server is left alone after failures.",
            registry=registry,
            multiprocess_mode="max",
        )

    def decided(self, seconds: float) -> None:
        self._decision.observe(seconds)

    def began(self, answered_by: str, seconds: float) -> None:
        self._first_part.labels(answered_by).observe(seconds)

    def ended(self, chosen: str, answered_by: str, seconds: float) -> None:
        self._requests.labels(self._plugin, chosen, answered_by).inc()
        self._answer.labels(answered_by).observe(seconds)

    def used(self, answered_by: str, prompt_tokens: int, completion_tokens: int) -> None:
        self._tokens.labels(answered_by, "prompt").inc(prompt_tokens)
        self._tokens.labels(answered_by, "completion").inc(completion_tokens)

    def failed(self, kind: str, is_down: bool) -> None:
        self._failures.labels(kind).inc()
        self.available(is_down)

    def available(self, is_down: bool) -> None:
        self._is_down.set(is_down)
