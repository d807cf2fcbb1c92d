"""The picture of a frontier: quality over distinct experts, one line a form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_instant.tools.moe.quality_budget_curve import BUDGET, NATIVE, Point

BOUND = 0.01
"""A perplexity that grows by less than this is called unharmed."""


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Write a PNG: growth of perplexity and KL divergence over the distinct experts of a layer and step.

    Args:
        points: settings at one batch size or several; one row of pictures for each.
        path: where to.
        title: what was measured.

    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    batches = sorted({point.batch for point in points if point.setting.form != NATIVE})
    figure, axes = pyplot.subplots(len(batches), 2, figsize=(9.5, 3.6 * len(batches)), squeeze=False)
    every = sorted({line_of(point) for point in points if point.setting.form != NATIVE})
    every.sort(key=lambda name: not name.startswith(BUDGET))
    colours = {name: f"C{number}" for number, name in enumerate(every)}
    for row, batch in zip(axes, batches, strict=True):
        of_batch = [point for point in points if point.batch == batch]
        here = {line_of(point) for point in of_batch if point.setting.form != NATIVE}
        for name in (name for name in every if name in here):
            line = sorted((p for p in of_batch if line_of(p) == name), key=lambda p: p.distinct.value)
            x = [p.distinct.value for p in line]
            style = {"color": colours[name], "marker": "o", "markersize": 3, "capsize": 2, "linewidth": 1.2}
            for axis, found, scale in ((row[0], [p.perplexity for p in line], 100), (row[1], [p.kl for p in line], 1)):
                y = [interval.value * scale for interval in found]
                spread = [
                    [max(0.0, interval.value - interval.low) * scale for interval in found],
                    [max(0.0, interval.high - interval.value) * scale for interval in found],
                ]
                axis.errorbar(x, y, yerr=spread, label=name, **style)
        natives = [p.distinct.value for p in of_batch if p.setting.form == NATIVE]
        for axis, label in ((row[0], "growth of perplexity, %"), (row[1], "KL divergence from native, nats")):
            axis.set_xlabel("distinct experts of a layer and step")
            axis.set_title(f"batch {batch}: {label}", fontsize=10)
            axis.grid(alpha=0.3)
            for native in natives:
                axis.axvline(native, color="grey", linestyle="--", linewidth=1)
        row[0].axhline(BOUND * 100, color="black", linestyle=":", linewidth=1)
        # What lies above is of no use; it would press everything else to the ground.
        row[0].set_ylim(-0.5, 12)
        row[1].set_ylim(0, 0.2)
    figure.suptitle(title, fontsize=11)
    handles: dict[str, object] = {}
    for axis in axes[:, 0]:
        handles |= dict(reversed(list(zip(*reversed(axis.get_legend_handles_labels()), strict=True))))
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.03 + 0.05 / len(batches), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def line_of(point: Point) -> str:
    """Which line of the picture a point belongs to."""
    setting = point.setting
    if setting.form == BUDGET:
        return f"{BUDGET}, keep {setting.keep}"
    if setting.cohesion:
        return f"{setting.form} × {setting.cohesion:g}, keep {setting.keep}"
    return setting.form
