"""Line plots as inline SVG, drawn by Matplotlib, without scripts and in colours that suit light and dark pages."""

from __future__ import annotations

import html
import importlib.util
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

ARM_COLORS = ("#6e7781", "#98a2ad", "#2f7de1", "#d9822b", "#9a5fd0")
"""Of the first, second, … arm; at least 2.4:1 against white and against a dark page."""
BAND_COLORS = {"spike": "#d6453d", "event": "#808a94"}
_INK = "#808a94"
_STYLE = {
    # Text stays text: small files, selectable, and in the page's font.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _INK,
    "grid.alpha": 0.25,
}


@dataclass(frozen=True)
class PlotLine:
    """One line; NaN in ``y`` leaves a gap."""

    name: str
    x: Sequence[float] | npt.NDArray[np.float64]
    y: Sequence[float] | npt.NDArray[np.float64]
    color: int = 0
    """Index into ``ARM_COLORS``."""
    dots: bool = False
    """Whether only its points are drawn, without a line."""


@dataclass(frozen=True)
class PlotBand:
    """A marked part of the horizontal axis."""

    began: float
    ended: float
    kind: str
    """``spike`` or ``event``."""
    title: str
    """Shown when the pointer is on it."""
    label: str = ""
    """Written above it."""


@dataclass(frozen=True)
class LinePlot:
    """What one plot shows."""

    title: str
    x_label: str
    lines: Sequence[PlotLine]
    bands: Sequence[PlotBand] = ()
    dots: bool = False
    log_x: bool = False
    max_y: float | None = None
    """Upper end of the vertical axis, which begins at 0; by default where the data end."""

    def svg(self) -> Markup:
        """The plot as an ``<svg>`` element."""
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": self.title}):
            figure = Figure(figsize=(5.2, 2.6), layout="constrained")
            FigureCanvasSVG(figure)
            axes = figure.add_subplot()
            for number, band in enumerate(self.bands):
                drawn = axes.axvspan(band.began, band.ended, color=BAND_COLORS[band.kind], alpha=0.18, linewidth=0)
                drawn.set_gid(f"band-{number}")
                if band.label:
                    middle = (band.began + band.ended) / 2
                    axes.annotate(band.label, (middle, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
            for line in self.lines:
                color = ARM_COLORS[line.color % len(ARM_COLORS)]
                style = "--" if line.color % len(ARM_COLORS) == 1 else "-"
                marker = "o" if self.dots or line.dots else ""
                style = "none" if line.dots else style
                axes.plot(line.x, line.y, linestyle=style, color=color, marker=marker, markersize=4, linewidth=1.5)
            if self.log_x:
                axes.set_xscale("log")
            axes.set_ylim(0, self.max_y)
            axes.set_xlabel(self.x_label)
            axes.grid(axis="y")
            written = io.StringIO()
            figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return Markup(self._inline(written.getvalue()))  # noqa: S704  written by Matplotlib, which escapes its texts

    def _inline(self, text: str) -> str:
        """Only the element, without ids that other plots of the page have too."""
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
        for number, band in enumerate(self.bands):
            group = f'<g id="band-{number}">'
            text = text.replace(group, f"<g><title>{html.escape(band.title)}</title>")
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        head, rest = text.split(">", 1)
        head = re.sub(r' (?:width|height)="[^"]*"', "", head)
        return f'{head} role="img" aria-label="{html.escape(self.title)}">{rest}'


def plots_available() -> bool:
    """Whether Matplotlib is installed; without it pages have their tables only."""
    return importlib.util.find_spec("matplotlib") is not None
