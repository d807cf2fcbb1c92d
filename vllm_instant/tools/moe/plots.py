"""The plot of a quality-budget curve: perplexity and KL divergence over the distinct experts, one line per form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_instant.tools.moe.quality_budget_curve import BUDGET, NATIVE, CurvePoint

NEGLIGIBLE_GROWTH = 0.01
"""Growth of the perplexity up to which a restriction counts as harmless; drawn as a line."""
MAX_GROWTH_PERCENT, MAX_KL = 12, 0.2
"""Upper ends of the axes: worse restrictions are of no use and would compress all others."""


def draw(points: Sequence[CurvePoint], path: Path, title: str) -> None:
    """Write a figure with two panels per batch size; the suffix of ``path`` determines its format."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "vllm-instant"
    from matplotlib import pyplot

    restricted = [point for point in points if point.setting.form != NATIVE]
    batches = sorted({point.batch for point in restricted})
    names = sorted({line_of(point) for point in restricted}, key=lambda name: (not name.startswith(BUDGET), name))
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    figure, axes = pyplot.subplots(len(batches), 2, figsize=(9.5, 3.6 * len(batches)), squeeze=False)
    for row, batch in zip(axes, batches, strict=True):
        native = [p.distinct.value for p in points if p.batch == batch and p.setting.form == NATIVE]
        _format_panels(row, batch, native)
        for name, colour in colours.items():
            line = [point for point in restricted if point.batch == batch and line_of(point) == name]
            _draw_line(row, sorted(line, key=lambda point: point.distinct.value), name, colour)
    figure.suptitle(title, fontsize=11)
    handles: dict[str, Any] = {}
    for axis in axes[:, 0]:
        handles |= dict(reversed(list(zip(*reversed(axis.get_legend_handles_labels()), strict=True))))
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.03 + 0.05 / len(batches), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date the same points give the same file.
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _format_panels(row: Any, batch: int, native: Sequence[float]) -> None:
    for axis, label in zip(row, ("growth of perplexity, %", "KL divergence from native, nats"), strict=True):
        axis.set_xlabel("distinct experts per layer and step")
        axis.set_title(f"batch {batch}: {label}", fontsize=10)
        axis.grid(alpha=0.3)
        for distinct in native:
            axis.axvline(distinct, color="grey", linestyle="--", linewidth=1)
    row[0].axhline(NEGLIGIBLE_GROWTH * 100, color="black", linestyle=":", linewidth=1)
    row[0].set_ylim(-0.5, MAX_GROWTH_PERCENT)
    row[1].set_ylim(0, MAX_KL)


def _draw_line(row: Any, line: Sequence[CurvePoint], name: str, colour: str) -> None:
    if not line:
        return
    x = [point.distinct.value for point in line]
    style = {"color": colour, "marker": "o", "markersize": 3, "capsize": 2, "linewidth": 1.2}
    panels = (row[0], [point.perplexity for point in line], 100), (row[1], [point.kl for point in line], 1)
    for axis, intervals, scale in panels:
        below = [max(0.0, interval.value - interval.low) * scale for interval in intervals]
        above = [max(0.0, interval.high - interval.value) * scale for interval in intervals]
        axis.errorbar(x, [interval.value * scale for interval in intervals], yerr=[below, above], label=name, **style)


def line_of(point: CurvePoint) -> str:
    """The name of the line that a point belongs to."""
    setting = point.setting
    if setting.form == BUDGET:
        return f"{BUDGET}, keep {setting.keep}"
    if setting.cohesion:
        return f"{setting.form} × {setting.cohesion:g}, keep {setting.keep}"
    return setting.form
