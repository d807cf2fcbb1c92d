"""Prometheus metrics of a draft server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class DraftServerMetrics:
    """Metrics of one draft server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix = "vllm_instant_draft_server_"

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(prefix + name, text, labels, registry=self.registry)

        self.clients = Gauge(f"{prefix}clients", "Connected engines.", registry=self.registry)
        self.requests = Gauge(f"{prefix}requests", "Requests that are drafted for.", registry=self.registry)
        self.cached_tokens = Gauge(f"{prefix}cached_tokens", "Tokens in the KV caches.", registry=self.registry)
        self.drafted = counter("drafted_tokens", "Draft tokens that were sent.")
        self.committed = counter("committed_tokens", "Tokens that engines committed, without prompts.")
        self.accepted = counter("accepted_tokens", "Committed tokens that had been drafted in time.")
        self.restarts = counter("restarts", "Drafts that began anew because the answer was another one.")
        self.evicted = counter("evicted_caches", "KV caches that were dropped because there were too many tokens.")
        self.refused = counter("refused", "Connections and requests that a limit refused.", ("limit",))
        self.model_seconds = counter("model_seconds", "Seconds that the model has run.")
