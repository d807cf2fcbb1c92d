"""One self-contained HTML page for a record: the table with its intervals drawn, speeds, times between tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, deployed
from vllm_instant.tools.bench.report import format_effect, format_floor, format_number
from vllm_instant.tools.bench.rows import BenchRow, verdicts
from vllm_instant.tools.html import Line, Plot, Tick, across, round_ticks, template, up
from vllm_instant.tools.measure.statistics import Estimate

SYMBOLS = {"better": "▲", "worse": "▼", "no difference": "=", "not measured": "–"}
MOST = 8.0
"""Ratios beyond this, or below its inverse, are drawn at the edge."""
LEAST = 1e-9
"""Stands for zero on a logarithmic axis."""


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
            abs(math.log(max(end, LEAST)))
            for row in rows
            for contrast in row.contrasts.values()
            if contrast.scale == "ratio"
            for end in (contrast.effect.low, contrast.effect.high, contrast.threshold)
        ]
        self._reach = min(math.log(MOST), max([*ends, math.log(1.2)])) * 1.05

    def place(self, ratio: float) -> float:
        """Percent from the left."""
        share = 0.5 + math.log(max(ratio, LEAST)) / (2 * self._reach)
        return round(100 * min(1.0, max(0.0, share)), 2)

    def span(self, estimate: Estimate) -> AxisSpan:
        """Of an interval."""
        return AxisSpan(self.place(estimate.low), self.place(estimate.high), self.place(estimate.mean))

    def ticks(self) -> list[Tick]:
        """Round ratios that fit."""
        choices = ((6, (2, 6)), (3, (3,)), (2, (2,)), (1.5, (1.5,)), (1, (1.2,)))
        fitting = next(ratios for least, ratios in choices if self._reach >= math.log(least))
        chosen = [1 / ratio for ratio in reversed(fitting)] + [1.0, *fitting]
        return [Tick(self.place(ratio), f"{ratio:.2f}".rstrip("0").rstrip(".") + "×") for ratio in chosen]


def render(record: Mapping[str, Any]) -> str:
    """The page."""
    rows = [BenchRow.read(plain) for plain in record["rows"]]
    axis = RatioAxis(rows)
    arms = list(record["arms"])
    return template("vllm_instant.tools.bench", "html_report.html").render(
        record=record,
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        arms=arms,
        tables=[(arm, verdicts(rows, arm), _groups(rows, arm, axis)) for arm in deployed(arms)],
        ticks=axis.ticks(),
        plots=_speeds(record, arms) + _latencies(record, arms),
        stock=BASELINE,
        again=BASELINE_AGAIN,
        symbols=SYMBOLS,
    )


def _groups(rows: Sequence[BenchRow], arm: str, axis: RatioAxis) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        contrast = row.contrasts.get(arm)
        cells: dict[str, Any] = {
            "name": row.name,
            "stock": format_number(row.values[BASELINE].mean, row.unit) if BASELINE in row.values else "",
            "ours": format_number(row.values[arm].mean, row.unit) if arm in row.values else "",
            "verdict": contrast.verdict if contrast else "not measured",
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


def _speeds(record: Mapping[str, Any], arms: Sequence[str]) -> list[Plot]:
    plots = []
    for users, by_arm in record["tokens_per_second_by_round"].items():
        top = max(speed for speeds in by_arm.values() for speed in speeds)
        ticks = round_ticks(top)
        rounds = len(by_arm[BASELINE])
        x = [across(i, 0, max(rounds - 1, 1), inset=12) for i in range(rounds)]
        lines = [
            Line(arm, style, [(x[i], up(speed, ticks[-1])) for i, speed in enumerate(by_arm[arm])])
            for style, arm in enumerate(arms)
        ]
        x_ticks = [Tick(x[i], str(i + 1)) for i in range(0, rounds, -(-rounds // 10))]
        y_ticks = [Tick(up(value, ticks[-1]), f"{value:g}") for value in ticks]
        plots.append(Plot(f"Output tokens/s, {users} at a time", "round", x_ticks, y_ticks, lines, dots=True))
    return plots


def _latencies(record: Mapping[str, Any], arms: Sequence[str]) -> list[Plot]:
    plots = []
    for users, by_arm in record["itl_ms_quantiles"].items():
        known = [(style, arm) for style, arm in enumerate(arms) if by_arm[arm]]
        values = [max(value, 0.01) for _, arm in known for _, value in by_arm[arm]]
        if not values:
            continue
        low, high = math.log10(min(values)), math.log10(max(values)) + 0.02
        lines = [
            Line(
                arm,
                style,
                [(across(math.log10(max(value, 0.01)), low, high), up(share, 1.0)) for share, value in by_arm[arm]],
            )
            for style, arm in known
        ]
        x_ticks = [Tick(across(math.log10(value), low, high), f"{value:g}") for value in _log_ticks(low, high)]
        y_ticks = [Tick(up(share, 1.0), f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)]
        title = f"Time between tokens, {users} at a time: share of tokens that took at most …"
        plots.append(Plot(title, "milliseconds", x_ticks, y_ticks, lines, dots=False))
    return plots


def _log_ticks(low: float, high: float) -> list[float]:
    values = [m * 10**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    return [value for value in values if low <= math.log10(value) <= high]
