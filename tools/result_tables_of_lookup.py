"""Tables of the lookup drafter beside another one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from result_tables import Cell, Run, Show, cells_of, table


def lookup(runs: Sequence[Run]) -> str:
    """Accepted tokens of both at the same number of drafted ones, and the time of a step in the slowest setting."""
    cells = list(cells_of(runs))
    rows = []
    for theirs in (cell for cell in cells if cell["arm"] == "arctic"):
        ours = [cell for cell in cells if cell["arm"] == "suffix" and cell["class"] == theirs["class"]]
        accepted = accepted_at(ours, theirs["drafted"])
        slowest = max(ours, key=lambda cell: float(cell["microseconds_p50"]))
        rows.append(
            [
                theirs["class"],
                f"{theirs['setting']:g}",
                f"{theirs['drafted']:.2f}",
                f"{theirs['accepted']:.3f}",
                f"{accepted:.3f}",
                f"{accepted / theirs['accepted']:.2f}",
                f"{theirs['microseconds_p50']:.0f}, {theirs['microseconds_mean']:.0f}",
                f"{slowest['microseconds_p50']:.0f}, {slowest['microseconds_mean']:.0f}",
                f"{theirs['bytes_per_history_token']:.0f}",
                f"{slowest['bytes_per_history_token']:.0f}",
            ]
        )
    head = ["class", "`max_spec_factor`", "drafted per step", "accepted, theirs", "accepted, `suffix`", "ratio"]
    head += ["µs per step, theirs: median, mean", "`suffix`", "bytes per token of history, theirs", "`suffix`"]
    return table(head, rows)


def accepted_at(cells: Sequence[Cell], drafted: float) -> float:
    """Accepted tokens of a drafter that is cut so that it drafts this many, or all it has, between its settings."""
    curve = sorted((cell["drafted"], cell["accepted"]) for cell in cells)
    return float(np.interp(drafted, [0.0, *(x for x, _ in curve)], [0.0, *(y for _, y in curve)]))


TABLES: dict[str, tuple[str, Show]] = {"lookup": ("lookup", lookup)}
