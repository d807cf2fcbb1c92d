"""Self-contained HTML pages: their style, and plots as inline SVG without scripts, light and dark."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460.0, 240.0, 44.0, 30.0, 10.0


@dataclass(frozen=True)
class Line:
    """One arm in a plot."""

    arm: str
    style: int
    points: list[tuple[float, float]]

    @property
    def path(self) -> str:
        """For an SVG polyline."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True)
class Tick:
    """A place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Band:
    """A stretch of the horizontal axis that is marked."""

    left: float
    width: float
    style: str
    """``spike`` or ``event``."""
    title: str
    label: str = ""
    """Written above it."""


@dataclass(frozen=True)
class Plot:
    """A drawing of 460 by 240."""

    title: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    dots: bool
    bands: list[Band] = field(default_factory=list)


def template(package: str, name: str) -> Template:
    """A page's template in a package; ``style.css`` and ``plot.html`` are there for it to include."""
    loader = ChoiceLoader([PackageLoader(package, ""), PackageLoader("vllm_instant.tools.html", "")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def across(value: float, low: float, high: float, inset: float = 0.0) -> float:
    """Where a value of the horizontal axis lies."""
    width = WIDTH - LEFT - 12 - 2 * inset
    return LEFT + inset + width * (value - low) / max(high - low, 1e-9)


def up(value: float, top: float) -> float:
    """Where a value of the vertical axis, which begins at 0, lies."""
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / top


def round_ticks(top: float) -> list[float]:
    """From 0 to at least ``top``, four or five steps."""
    step = 10 ** math.floor(math.log10(top / 4))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if step * factor * 5 >= top)
    return [step * i for i in range(math.ceil(top / step) + 1)]
