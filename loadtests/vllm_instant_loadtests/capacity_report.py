"""Writes the result of a capacity search: an HTML page with goodput over rate, JSON, and JUnit XML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from vllm_instant.tools.html import template
from vllm_instant.tools.html.plots import ARM_COLORS, LinePlot, PlotBand, PlotLine, plots_available
from vllm_instant_loadtests.capacity import CapacityAnalysis, ServerCapacity
from vllm_instant_loadtests.capacity_goals import ATTAIN
from vllm_instant_loadtests.report import finite, number

_NO_ENVIRONMENT_INFO: dict[str, Any] = {"device": "", "date": "", "command": "", "versions": {}}
_FIRST_COLOR = 2


def write(analysis: CapacityAnalysis, folder: Path) -> None:
    """Write ``capacity.html``, ``capacity.json`` and ``junit.xml`` into the folder of the run."""
    (folder / "capacity.html").write_text(page(analysis), encoding="utf-8")
    text = json.dumps(finite(analysis.plain()), indent=1) + "\n"
    (folder / "capacity.json").write_text(text, encoding="utf-8")
    write_junit(analysis, folder / "junit.xml")


def page(analysis: CapacityAnalysis) -> str:
    """One self-contained page."""
    drawn = plots_available() and bool(analysis.servers)
    return template("vllm_instant_loadtests", "capacity.html").render(
        scenario=analysis.about.get("scenario") or {},
        environment_info=_NO_ENVIRONMENT_INFO | (analysis.about.get("environment_info") or {}),
        analysis=analysis,
        goals=[goal.name for goal in analysis.plan.share_goals],
        plots=[_goodput(analysis), *map(_shares, analysis.servers)] if drawn else [],
        key=[(server.server, _color(place)) for place, server in enumerate(analysis.servers)],
        goal_key=[(goal.name, _color(place)) for place, goal in enumerate(analysis.plan.share_goals)],
        number=number,
    )


def write_junit(analysis: CapacityAnalysis, path: Path) -> None:
    """Write one test case per server, which fails without a capacity, and one per comparison, which fails if worse."""
    suites = ElementTree.Element("testsuites", name="vllm-instant loadtest capacity")
    name = str((analysis.about.get("scenario") or {}).get("name", "capacity"))
    suite = ElementTree.SubElement(suites, "testsuite", name=f"{name}: capacity")
    found = [
        (server.server, server.sentence, server.bounded and (server.finished or bool(analysis.plan.rates)))
        for server in analysis.servers
    ]
    found += [
        (f"{ours} compared with {theirs}", analysis.verdict(ours, theirs), contrast.verdict != "worse")
        for (ours, theirs), contrast in analysis.comparisons.items()
    ]
    for title, sentence, passed in found:
        case = ElementTree.SubElement(suite, "testcase", classname="capacity", name=title)
        if passed:
            ElementTree.SubElement(case, "system-out").text = sentence
        else:
            ElementTree.SubElement(case, "failure", message=sentence)
    suite.set("tests", str(len(found)))
    suite.set("failures", str(sum(not passed for _, _, passed in found)))
    ElementTree.indent(suites)
    ElementTree.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)


def _color(place: int) -> str:
    return ARM_COLORS[(_FIRST_COLOR + place) % len(ARM_COLORS)]


def _goodput(analysis: CapacityAnalysis) -> LinePlot:
    """Requests per second within all limits: of each probe, and expected."""
    lines, bands = [], []
    for place, server in enumerate(analysis.servers):
        color = _FIRST_COLOR + place
        rates = np.array(server.curve["rate"])
        lines.append(PlotLine(server.server, rates, rates * np.array(server.curve[ATTAIN]), color))
        probes = sorted(server.probes, key=lambda probe: probe.rate)
        lines.append(PlotLine("", [p.rate for p in probes], [p.goodput for p in probes], color, dots=True))
        if server.bounded:
            bands.append(PlotBand(server.rate.low, server.rate.high, "event", server.sentence, server.server))
    return LinePlot("Goodput over rate, requests per second", "requests per second that were sent", lines, bands)


def _shares(server: ServerCapacity) -> LinePlot:
    """Share of requests within each goal."""
    lines = []
    for place, goal in enumerate(name for name in server.curve if name != "rate"):
        color = _FIRST_COLOR + place
        lines.append(PlotLine(goal, server.curve["rate"], 100 * np.array(server.curve[goal]), color))
        probes = [p for p in sorted(server.probes, key=lambda p: p.rate) if goal in p.counts]
        shares = [100 * p.counts[goal][0] / p.counts[goal][1] for p in probes]
        lines.append(PlotLine("", [p.rate for p in probes], shares, color, dots=True))
    bands = [PlotBand(server.rate.low, server.rate.high, "event", server.sentence)] if server.bounded else []
    title = f"{server.server}: share within {', '.join(name for name in server.curve if name != 'rate')}, %"
    return LinePlot(title, "requests per second that were sent", lines, bands, max_y=105.0)
