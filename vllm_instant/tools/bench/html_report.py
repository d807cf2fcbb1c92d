"""One self-contained HTML page for a result: the table with its intervals drawn, speeds, times between tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, deployed
from vllm_instant.tools.bench.report import format_effect, format_floor, format_number, verdict
from vllm_instant.tools.bench.rows import BenchRow, verdicts
from vllm_instant.tools.html import template
from vllm_instant.tools.html.plots import LinePlot, PlotLine, plots_available
from vllm_instant.tools.measure.statistics import Estimate

SYMBOLS = {"better": "▲", "worse": "▼", "same": "=", "undecided": "?", "not measured": "–"}
MAX_RATIO = 8.0
"""Ratios beyond this, or below its inverse, are drawn at the edge."""
MIN_RATIO = 1e-9
"""Stands for zero on a logarithmic axis."""
MIN_LATENCY_MS = 0.01
"""Shorter times between tokens are drawn here."""


@dataclass(frozen=True)
class AxisTick:
    """A labelled place on the ratio axis, in percent of its width."""

    at: float
    label: str


@dataclass(frozen=True)
class AxisSpan:
    """An interval on the ratio axis, in percent of its width."""

    left: float
    right: float
    middle: float


class RatioAxis:
    """Ratios on a logarithmic scale around 1."""

    def __init__(self, rows: Sequence[BenchRow]) -> None:
        ends = [
            abs(math.log(max(end, MIN_RATIO)))
            for row in rows
            for contrast in row.contrasts.values()
            if contrast.scale == "ratio"
            for end in (contrast.effect.low, contrast.effect.high, contrast.threshold)
        ]
        self._reach = min(math.log(MAX_RATIO), max([*ends, math.log(1.2)])) * 1.05

    def place(self, ratio: float) -> float:
        """Percent from the left."""
        share = 0.5 + math.log(max(ratio, MIN_RATIO)) / (2 * self._reach)
        return round(100 * min(1.0, max(0.0, share)), 2)

    def span(self, estimate: Estimate) -> AxisSpan:
        """The places of an interval."""
        return AxisSpan(self.place(estimate.low), self.place(estimate.high), self.place(estimate.mean))

    def ticks(self) -> list[AxisTick]:
        """Round ratios inside the axis."""
        choices = ((6, (2, 6)), (3, (3,)), (2, (2,)), (1.5, (1.5,)), (1, (1.2,)))
        fitting = next(ratios for factor, ratios in choices if self._reach >= math.log(factor))
        chosen = [1 / ratio for ratio in reversed(fitting)] + [1.0, *fitting]
        return [AxisTick(self.place(ratio), f"{ratio:.2f}".rstrip("0").rstrip(".") + "×") for ratio in chosen]


def render(record: Mapping[str, Any]) -> str:
    """The page of a result."""
    rows = [BenchRow.read(plain) for plain in record["rows"]]
    axis = RatioAxis(rows)
    arms = list(record["arms"])
    return template("vllm_instant.tools.bench", "html_report.html").render(
        record=record,
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        arms=arms,
        tables=[(arm, verdicts(rows, arm), _groups(rows, arm, axis)) for arm in deployed(arms)],
        ticks=axis.ticks(),
        plots=_speeds(record, arms) + _latencies(record, arms) if plots_available() else [],
        baseline=BASELINE,
        again=BASELINE_AGAIN,
        symbols=SYMBOLS,
    )


def _groups(rows: Sequence[BenchRow], arm: str, axis: RatioAxis) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        contrast = row.contrasts.get(arm)
        cells: dict[str, Any] = {
            "name": row.name,
            "baseline": format_number(row.values[BASELINE].mean, row.unit) if BASELINE in row.values else "",
            "ours": format_number(row.values[arm].mean, row.unit) if arm in row.values else "",
            "verdict": contrast.verdict if contrast else "not measured",
            "said": verdict(contrast) if contrast else "not measured",
            "why": "" if contrast else row.missing or "a value is zero",
            "effect": format_effect(contrast) if contrast else "",
            "floor": format_floor(contrast) if contrast else "",
            "drawn": None,
        }
        if contrast is not None and contrast.scale == "ratio":
            limits = Estimate(1.0, 1 / contrast.threshold, contrast.threshold)
            cells["drawn"] = (axis.span(limits), axis.span(contrast.floor), axis.span(contrast.effect))
        groups.setdefault(row.group, []).append(cells)
    return list(groups.items())


def _speeds(record: Mapping[str, Any], arms: Sequence[str]) -> list[LinePlot]:
    plots = []
    for users, by_arm in record["tokens_per_second_by_round"].items():
        lines = [
            PlotLine(arm, [number + 1 for number in range(len(by_arm[arm]))], by_arm[arm], color)
            for color, arm in enumerate(arms)
        ]
        plots.append(LinePlot(f"Output tokens/s, {users} at a time", "round", lines, dots=True))
    return plots


def _latencies(record: Mapping[str, Any], arms: Sequence[str]) -> list[LinePlot]:
    plots = []
    for users, by_arm in record["itl_ms_quantiles"].items():
        lines = [
            PlotLine(
                arm,
                [max(value, MIN_LATENCY_MS) for _, value in by_arm[arm]],
                [100 * share for share, _ in by_arm[arm]],
                color,
            )
            for color, arm in enumerate(arms)
            if by_arm[arm]
        ]
        if lines:
            title = f"Time between tokens, {users} at a time: % of tokens that took at most …"
            plots.append(LinePlot(title, "milliseconds", lines, log_x=True, max_y=100.0))
    return plots
