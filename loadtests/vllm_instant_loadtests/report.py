"""Writes an analysis as files: an HTML page, JSON for programs, JUnit XML for CI."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from vllm_instant.tools.html import template
from vllm_instant.tools.html.plots import LinePlot, PlotBand, PlotLine, plots_available
from vllm_instant.tools.measure import server_metrics as m
from vllm_instant_loadtests.analysis import NAMES, RunAnalysis, ServerAnalysis, Spike, got_worse
from vllm_instant_loadtests.metric_series import MetricSeries
from vllm_instant_loadtests.run_recorder import RecordedRun
from vllm_instant_loadtests.windows import HOP, ITL, METRICS, PACE, STALL, TTFT, WARM_UP, Array

SYMBOLS = {"better": "▲", "worse": "▼", "same": "=", "undecided": "?", "not measured": "–"}
# Defaults for recordings of other programs.
_NO_SCENARIO: dict[str, Any] = {"title": "", "name": "", "description": ""}
_NO_ENVIRONMENT_INFO: dict[str, Any] = {"device": "", "date": "", "command": "", "versions": {}}
_NO_SERVER: dict[str, Any] = {"url": "", "version": "", "deployment": ""}


@dataclass(frozen=True)
class PlotCurve:
    """One line of a plot."""

    name: str
    at: Array
    values: Array


def write_html(analysis: RunAnalysis, run: RecordedRun, path: Path) -> None:
    """Write one self-contained page: goals, spikes with their evidence, comparisons, all metrics over time."""
    page = template("vllm_instant_loadtests", "report.html").render(
        scenario=_NO_SCENARIO | (analysis.about.get("scenario") or {}),
        environment_info=_NO_ENVIRONMENT_INFO | (analysis.about.get("environment_info") or {}),
        finished=analysis.about.get("finished", True),
        played=[_NO_SERVER | server for server in analysis.about.get("servers", [])],
        analysis=analysis,
        servers=[
            (server, plots(server, run.of(server.server)) if plots_available() else []) for server in analysis.servers
        ],
        names=NAMES,
        metrics=METRICS,
        symbols=SYMBOLS,
        number=number,
        shares=("p50", "p95", "p99", "mean"),
    )
    path.write_text(page, encoding="utf-8")


def write_json(analysis: RunAnalysis, path: Path) -> None:
    """Write ``RunAnalysis.plain``; NaN and infinity become null."""
    path.write_text(json.dumps(finite(analysis.plain()), indent=1) + "\n", encoding="utf-8")


def write_junit(analysis: RunAnalysis, path: Path) -> None:
    """Write one test case per goal, which fails where the goal is missed, and one per spike.

    The case of a spike fails only where the number of spikes is a goal; otherwise the spike is its output.
    """
    judged = any(checked.goal == "spikes" for checked in analysis.goals)
    scenario = str((analysis.about.get("scenario") or {}).get("name", "load test"))
    suites = ElementTree.Element("testsuites", name="vllm-instant loadtest")
    for server in analysis.servers:
        suite = ElementTree.SubElement(suites, "testsuite", name=f"{scenario}: {server.server}")
        cases = failures = 0
        for checked in (one for one in analysis.goals if one.server == server.server):
            case = ElementTree.SubElement(suite, "testcase", classname=server.server, name=checked.goal)
            cases += 1
            if not checked.met:
                failures += 1
                ElementTree.SubElement(case, "failure", message=checked.sentence)
        for spike in server.spikes:
            name = f"{spike.cause} at {spike.began:.1f} s"
            case = ElementTree.SubElement(suite, "testcase", classname=f"{server.server}.spikes", name=name)
            text = "\n".join([spike.sentence, *spike.evidence])
            cases += 1
            if judged and not all(c.met for c in analysis.goals if c.goal == "spikes" and c.server == server.server):
                failures += 1
                ElementTree.SubElement(case, "failure", message=spike.sentence).text = text
            else:
                ElementTree.SubElement(case, "system-out").text = text
        suite.set("tests", str(cases))
        suite.set("failures", str(failures))
        suite.set("time", f"{server.seconds:.3f}")
    if analysis.since:
        suite = ElementTree.SubElement(suites, "testsuite", name=f"{scenario}: since the baseline")
        for comparison in analysis.since:
            case = ElementTree.SubElement(suite, "testcase", classname="baseline", name=comparison.ours)
            if got_worse(comparison):
                ElementTree.SubElement(case, "failure", message=comparison.verdict)
            else:
                ElementTree.SubElement(case, "system-out").text = comparison.verdict
        suite.set("tests", str(len(analysis.since)))
        suite.set("failures", str(sum(map(got_worse, analysis.since))))
    ElementTree.indent(suites)
    ElementTree.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)


def plots(server: ServerAnalysis, run: RecordedRun) -> list[LinePlot]:
    """The plots of one server: latencies over time, and the metrics that explain them."""
    metrics = MetricSeries(run.samples)
    found = [_plot(server, f"{NAMES[metric]}, ms", _latency(server, metric)) for metric in (TTFT, ITL, PACE, STALL)]
    running = [PlotCurve(name, *_known(metrics, key)) for name, key in (("running", m.RUNNING), ("waiting", m.WAITING))]
    found.append(_plot(server, "Requests running and waiting", running))
    if metrics.has(m.DRAFTED):
        found.append(_plot(server, "Share of draft tokens accepted, %", [_accepted(metrics)], max_y=100.0))
    found.append(_plot(server, "KV cache in use, %", [_percent(metrics, m.KV_USAGE)]))
    found.append(_plot(server, "Tokens per second, all streams", [_speed(server, run)]))
    return [plot for plot in found if plot is not None]


def number(value: float | None) -> str:
    """The number as text; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _latency(server: ServerAnalysis, metric: str) -> list[PlotCurve]:
    series = server.series[metric]
    return [PlotCurve(NAMES[metric], series.at, series.values * 1e3)]


def _plot(
    server: ServerAnalysis, title: str, curves: Sequence[PlotCurve], max_y: float | None = None
) -> LinePlot | None:
    known = [curve for curve in curves if np.isfinite(curve.values).any()]
    if not known:
        return None
    ends = [end for curve in known for end in (curve.at[0], curve.at[-1])]
    low, high = min(ends), max(ends)
    if high <= low:
        return None
    lines = [PlotLine(curve.name, *_with_gaps(curve), color=2 + 2 * number) for number, curve in enumerate(known)]
    return LinePlot(title, "seconds", lines, _bands(server, low, high), max_y=max_y)


def _with_gaps(curve: PlotCurve) -> tuple[Array, Array]:
    """The measured points, with NaN where the server was not asked for a while, so that no line crosses it."""
    known = np.isfinite(curve.values)
    at, values = curve.at[known], curve.values[known]
    gaps = np.flatnonzero(np.diff(at) > 2 * WARM_UP + 2 * HOP) + 1
    return np.insert(at, gaps, np.nan), np.insert(values, gaps, np.nan)


def _bands(server: ServerAnalysis, low: float, high: float) -> list[PlotBand]:
    events = [
        PlotBand(
            max(event.began, low), min(event.ended, high), "event", f"injected: {event.cause} {event.note}".strip()
        )
        for event in server.events
        if event.ended > low and event.began < high
    ]
    return events + [
        PlotBand(max(spike.began, low), min(spike.ended, high), "spike", _title(spike), str(number + 1))
        for number, spike in enumerate(server.spikes)
    ]


def _title(spike: Spike) -> str:
    return f"{spike.cause}: {spike.sentence}"


def _known(metrics: MetricSeries, name: str) -> tuple[Array, Array]:
    return metrics.at, metrics.values(name)


def _percent(metrics: MetricSeries, name: str) -> PlotCurve:
    return PlotCurve(name, metrics.at, metrics.values(name) * 100)


def _accepted(metrics: MetricSeries) -> PlotCurve:
    at = np.arange(metrics.at[0] + 1, metrics.at[-1], HOP)
    values = [metrics.ratio(m.ACCEPTED, m.DRAFTED, [(float(end) - 1, float(end))]) for end in at]
    return PlotCurve("accepted", at - 0.5, np.array(values) * 100)


def _speed(server: ServerAnalysis, run: RecordedRun) -> PlotCurve:
    series = server.series[STALL]
    came = [
        (when, have - had)
        for request in run.requests
        for (when, have), had in zip(request.arrivals, [0, *(n for _, n in request.arrivals)], strict=False)
    ]
    if not came or not len(series.at):
        return PlotCurve("tokens", np.empty(0), np.empty(0))
    times, tokens = np.array(sorted(came)).T
    cumulated = np.concatenate([[0.0], np.cumsum(tokens)])
    began, ended = (np.searchsorted(times, series.at + side) for side in (-series.half, series.half))
    return PlotCurve("tokens", series.at, (cumulated[ended] - cumulated[began]) / (2 * series.half))


def finite(value: Any) -> Any:
    """The value as JSON types; NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
