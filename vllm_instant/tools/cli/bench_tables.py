"""The tables that ``vllm-instant bench`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from vllm_instant.tools.bench.compare import RowChange
from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, deployed
from vllm_instant.tools.bench.report import format_effect, format_floor, format_number, summary, verdict
from vllm_instant.tools.bench.rows import BenchRow
from vllm_instant.tools.cli.common import print_columns
from vllm_instant.tools.measure.significance import FALSE_ALARMS

STYLES = {"better": "green", "worse": "bold red", "same": "dim", "undecided": "yellow", "not measured": "yellow"}


def show(found: Mapping[str, Any]) -> None:
    """Print a result."""
    console = Console(soft_wrap=True)
    lines = [BenchRow.read(plain) for plain in found["rows"]]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    console.print(f"{found['model']} on {found['device']}; {versions}; {found['date']}", highlight=False)
    for arm in deployed(list(found["arms"])):
        console.print(f"\n{arm} compared with vLLM", style="bold", highlight=False)
        headings = ("", BASELINE, arm, f"{arm} / {BASELINE} [95 %]", f"{BASELINE_AGAIN} / {BASELINE} [95 %]", "verdict")
        print_columns(headings, _table(lines, arm))
        console.print(summary(lines, arm), highlight=False)
    console.print(
        f"\nBetter or worse: the interval that holds for all rows at once ({1 - FALSE_ALARMS:.0%}) excludes zero "
        f"difference, and the difference is larger than the stated margin (speed: {found['margin']:.0%}) and than the "
        "interval of the second vLLM server. Same: the shown interval lies within the margin.",
        highlight=False,
    )
    for note in found["notes"]:
        console.print(note, highlight=False)


def _table(lines: Sequence[BenchRow], arm: str) -> list[list[str | Text]]:
    """The cells, with one line per group."""
    cells: list[list[str | Text]] = []
    group = ""
    for row in lines:
        if row.group != group:
            group = row.group
            cells.append([Text(group, "bold"), "", "", "", "", ""])
        cells.append([f"  {row.name}", *_row_cells(row, arm)])
    return cells


def _row_cells(row: BenchRow, arm: str) -> list[str | Text]:
    """Baseline, arm, effect, floor, verdict."""
    contrast = row.contrasts.get(arm)
    values = [format_number(row.values[name].mean, row.unit) if name in row.values else "" for name in (BASELINE, arm)]
    if contrast is None:
        why = row.missing or "a value is zero"
        return [*values, "", "", Text(f"not measured: {why}", STYLES["not measured"])]
    return [*values, format_effect(contrast), format_floor(contrast), Text(verdict(contrast), STYLES[contrast.verdict])]


def show_changes(before: Mapping[str, Any], after: Mapping[str, Any], found: list[RowChange]) -> None:
    """Print the changes."""
    console = Console(soft_wrap=True)
    for name, record in (("before", before), ("after", after)):
        versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        console.print(f"{name}: {record['date']}, {record['device']}, {versions}", highlight=False)
    if before["device"] != after["device"]:
        console.print("The devices differ: each run is compared with its own vLLM servers.")
    cells: list[list[str | Text]] = []
    for row, arm, change in found:
        named = [arm, f"{row.group}: {row.name}"]
        if change is None:
            cells.append([*named, "", "", Text("not in both", STYLES["not measured"])])
        else:
            cells.append(
                [*named, format_effect(change), format_floor(change), Text(verdict(change), STYLES[change.verdict])]
            )
    print_columns(("arm", "row", "after / before [95 %]", "larger noise floor [95 %]", "verdict"), cells)
