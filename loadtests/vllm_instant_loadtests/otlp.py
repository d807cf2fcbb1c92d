"""Sends the results of a load test to an OpenTelemetry collector (OTLP over HTTP), which most monitoring systems read.

Prometheus takes OTLP as well (``--web.enable-otlp-receiver``, ``/api/v1/otlp/v1/metrics``), so that remote-write needs
no client of its own here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm_instant_loadtests.analysis import RunAnalysis
from vllm_instant_loadtests.capacity import CapacityAnalysis

PREFIX = "vllm_instant.loadtest."


class ExportError(Exception):
    """Results could not be sent; the message is one sentence."""


@dataclass(frozen=True)
class Measurement:
    """One value of a gauge."""

    name: str
    value: float
    unit: str
    attributes: dict[str, str] = field(default_factory=dict)


def run_measurements(analysis: RunAnalysis) -> Iterator[Measurement]:
    """What a run measured: latencies in seconds by server, counts, and whether each goal was met (1 or 0)."""
    for server in analysis.servers:
        of_server = {"server": server.server}
        for metric, shares in server.percentiles.items():
            for share, value in shares.items():
                attributes = {**of_server, "metric": metric, "statistic": share}
                yield Measurement(f"{PREFIX}latency", value / 1e3, "s", attributes)
        yield Measurement(f"{PREFIX}throughput", server.tokens_per_second, "{token}/s", of_server)
        yield Measurement(f"{PREFIX}requests", server.requests, "{request}", of_server)
        yield Measurement(f"{PREFIX}failures", server.failed, "{request}", of_server)
        yield Measurement(f"{PREFIX}spikes", len(server.spikes), "{spike}", of_server)
    for goal in analysis.goals:
        yield Measurement(f"{PREFIX}goal_met", float(goal.met), "1", {"server": goal.server, "goal": goal.goal})


def capacity_measurements(analysis: CapacityAnalysis) -> Iterator[Measurement]:
    """The capacity of each server in requests per second, with the ends of its interval."""
    for server in analysis.servers:
        if server.bounded:
            for statistic, value in (
                ("median", server.rate.mean),
                ("low", server.rate.low),
                ("high", server.rate.high),
            ):
                attributes = {"server": server.server, "statistic": statistic}
                yield Measurement(f"{PREFIX}capacity", value, "{request}/s", attributes)


def send(measurements: Iterator[Measurement], url: str, scenario: str) -> int:
    """Send gauges to ``URL/v1/metrics`` (or to ``URL`` where it names a path to metrics); returns their number.

    Headers, for example of authorization, are those of ``OTEL_EXPORTER_OTLP_HEADERS``.

    Raises:
        ExportError: where the collector does not take them, or OpenTelemetry is not installed.

    """
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import MetricExportResult, PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
    except ImportError:
        raise ExportError("--otlp needs OpenTelemetry: pip install 'vllm-instant[otlp]'") from None

    class Checked(OTLPMetricExporter):
        """Remembers whether the collector took everything: the reader only logs it."""

        failed = False

        def export(self, *args: Any, **more: Any) -> Any:
            found = super().export(*args, **more)
            self.failed = self.failed or found is not MetricExportResult.SUCCESS
            return found

    endpoint = url if url.rstrip("/").endswith("/metrics") else f"{url.rstrip('/')}/v1/metrics"
    exporter = Checked(endpoint=endpoint, timeout=5)
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=math.inf)
    provider = MeterProvider([reader], Resource.create({"service.name": "vllm-instant loadtest"}))
    meter, count = provider.get_meter("vllm_instant_loadtests"), 0
    gauges: dict[str, Any] = {}
    for one in measurements:
        if math.isfinite(one.value):
            if one.name not in gauges:
                gauges[one.name] = meter.create_gauge(one.name, unit=one.unit)
            gauges[one.name].set(one.value, {**one.attributes, "scenario": scenario})
            count += 1
    provider.force_flush()
    provider.shutdown()
    if exporter.failed:
        raise ExportError(f"--otlp {url} did not take the results: is it an OTLP collector over HTTP?")
    return count
