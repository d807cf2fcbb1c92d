"""Prometheus metrics of streaming sessions."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from vllm_instant.metrics import PREFIX

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)


class StreamingMetrics:
    """Metrics of one API server; those of several servers of one deployment add up.

    Args:
        registry: Registry of the metrics; by default that of the process.

    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.sessions = Gauge(
            f"{PREFIX}streaming_sessions",
            "Open sessions whose prompts are still being typed.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.pinned = Gauge(
            f"{PREFIX}streaming_held_sessions",
            "Sessions whose KV blocks are pinned between chunks.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.refused = Counter(
            f"{PREFIX}streaming_refused_sessions", "Sessions refused by a limit.", ["limit"], registry=registry
        )
        self.prefills = Counter(
            f"{PREFIX}streaming_prefill_requests",
            "One-token requests that prefill a prompt before its commit; vLLM's own request metrics exclude them.",
            registry=registry,
        )
        self.prefill_tokens = Counter(
            f"{PREFIX}streaming_prefill_tokens",
            "Prompt tokens that were prefilled before the commit.",
            registry=registry,
        )
        self.ttft = Histogram(
            f"{PREFIX}streaming_time_to_first_token_seconds",
            "Time from the commit of a prompt to the first token of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.speculative_answers = Counter(
            f"{PREFIX}streaming_early_answers",
            "Answers that were started before the commit (begun), and those of them that were used (used).",
            ["outcome"],
            registry=registry,
        )
