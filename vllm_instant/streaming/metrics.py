"""The numbers of sessions on ``/metrics``."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from vllm_instant.metrics import PREFIX

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)


class StreamingMetrics:
    """Prometheus metrics of one API server; several servers of one deployment add up.

    Args:
        registry: where the metrics live; the process's own by default.

    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.sessions = Gauge(
            f"{PREFIX}streaming_sessions",
            "Open sessions with prompts that are still arriving.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.held = Gauge(
            f"{PREFIX}streaming_held_sessions",
            "Sessions that keep their KV blocks between chunks.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.refused = Counter(
            f"{PREFIX}streaming_refused_sessions", "Sessions refused by a limit.", ["limit"], registry=registry
        )
        self.prefills = Counter(
            f"{PREFIX}streaming_prefill_requests",
            "One-token requests that read a prompt ahead; vLLM's own request metrics leave them out.",
            registry=registry,
        )
        self.prefill_tokens = Counter(
            f"{PREFIX}streaming_prefill_tokens", "Prompt tokens that were read ahead.", registry=registry
        )
        self.ttft = Histogram(
            f"{PREFIX}streaming_time_to_first_token_seconds",
            "From the commit of a prompt to the first token of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.early = Counter(
            f"{PREFIX}streaming_early_answers",
            "Answers that were begun before the commit, by what became of them.",
            ["outcome"],
            registry=registry,
        )
