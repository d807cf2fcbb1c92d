"""The table of the guard: leaks, false stops, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from result_tables import Cell, Run, Show, cells_of, interval, table

from vllm_instant.tools.measure.guard_check import FalseStops


def guard(runs: Sequence[Run]) -> str:
    """All parts that were measured."""
    cells = list(cells_of(runs))
    parts = {cell["part"]: cell for cell in cells}
    for name, added in (("planted", _added_leaks), ("clean", _added_stops)):
        if name in parts:
            parts[name] = added([cell for cell in cells if cell["part"] == name])
    rows: list[list[str]] = []
    for name, show in (("planted", _planted), ("clean", _clean), ("patterns", _patterns), ("classifier", _classifier)):
        if name in parts:
            rows.extend(show(parts[name]))
    if "planner" in parts:
        found = parts["planner"]
        for kind, value in found["first field, ms"].items():
            ratio = f"; ratio {interval(found['ratio'])}" if kind == "typed" else ""
            case = f"{found['characters']} characters, {kind}"
            rows.append(["last key of a wish to the first field, ms", case, f"{interval(value, 0)}{ratio}"])
    if "delay" in parts:
        rows.extend(_delay(parts["delay"]))
    return table(["measured", "case", "found"], rows)


def _added_leaks(cells: Sequence[Cell]) -> Cell:
    """The runs of several seeds as one."""
    whole: dict[str, Any] = {}
    for late in ("wait", "release"):
        found = [cell[late] for cell in cells]
        sums = {key: sum(each[key] for each in found) for key in ("count", "stopped", "leaked", "missed")}
        whole[late] = {**sums, "max_leak": max(each["max_leak"] for each in found), "window": found[0]["window"]}
    return whole


def _added_stops(cells: Sequence[Cell]) -> Cell:
    found = FalseStops(sum(cell["count"] for cell in cells), sum(cell["stopped"] for cell in cells))
    return {"count": found.count, "stopped": found.stopped, "interval": found.interval()}


def _planted(cell: Cell) -> Iterator[list[str]]:
    for late, case in (("wait", "`rules`"), ("release", "`rules`, verdicts 30 ms late")):
        found = cell[late]
        yield [
            "planted violations, ten paths",
            f'{case}, `late = "{late}"`, window {found["window"]} tokens',
            f"{found['count']:,}: {found['leaked']} leaked beyond the window, at most {found['max_leak']} tokens, "
            f"{found['missed']} missed",
        ]


def _clean(cell: Cell) -> Iterator[list[str]]:
    yield ["false stops of clean passages", "`rules`", _rate(cell)]


def _rate(cell: Cell) -> str:
    low, high = cell["interval"]
    return f"{cell['stopped']:,} of {cell['count']:,}: {100 * low:.4f} to {100 * high:.4f} %"


def _patterns(cell: Cell) -> Iterator[list[str]]:
    for name, found in cell.items():
        if isinstance(found, dict):
            case = f"{cell['words']:,} words, {cell['patterns']} expressions; median, 99th percentile, maximum"
            yield [f"time per {name}", case, f"{found['p50']:.2f}, {found['p99']:.2f}, {found['max']:.2f}"]


def _classifier(cell: Cell) -> Iterator[list[str]]:
    for name in ("clean", "unsafe"):
        yield [f"stopped {name} texts", f"demo classifier, threshold {cell['threshold']}", _rate(cell[name])]


def _delay(cell: Cell) -> Iterator[list[str]]:
    arms = cell["arms"]
    for key in arms["off"]:
        for arm, found in arms.items():
            ratio = f"; ratio to off {interval(found[f'{key} to off'])}" if arm != "off" else ""
            yield [f"{key}, {cell['streams']} streams", f"`{arm}`", f"{interval(found[key], 1)}{ratio}"]


TABLES: dict[str, tuple[str, Show]] = {"guard": ("guard", guard)}
