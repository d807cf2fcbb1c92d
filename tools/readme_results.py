#!/usr/bin/env python3
"""Write the README's tables of results from the committed files in benchmarks/results.

    .venv/bin/python tools/readme_results.py [--check]

Only what stands between the markers is replaced; ``--check`` exits with 1 if that would change anything.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, OURS
from vllm_instant.tools.bench.report import format_effect, format_floor, format_number
from vllm_instant.tools.bench.rows import BenchRow

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results"
BLOCK = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", re.DOTALL)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        f"| {' | '.join(line)} |".replace("|  |", "| |").replace("| --- ", "|---").strip() for line in lines
    )


def bench(record: Mapping[str, Any]) -> str:
    """What `vllm-instant bench` found for the demo's model, with what it belongs to."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rows = []
    for row in map(BenchRow.read, record["rows"]):
        contrast = row.contrasts.get(OURS)
        values = [
            format_number(row.values[arm].mean, row.unit) if arm in row.values else "" for arm in (BASELINE, OURS)
        ]
        why = f"not measured: {row.missing or 'a value is zero'}"
        judged = (
            ["", "", why] if contrast is None else [format_effect(contrast), format_floor(contrast), contrast.verdict]
        )
        rows.append([f"{row.group}: {row.name}", *values, *judged])
    headings = ["", BASELINE, OURS, f"{OURS} / {BASELINE} [95 %]", f"{BASELINE_AGAIN} / {BASELINE} [95 %]", "verdict"]
    return (
        f"Made by `{record['command']}` on {record['device']}; {versions}; {record['date']}. "
        f"{record['setup']['rounds']} rounds, every server started {record['setup']['starts']} times.\n\n"
        f"{table(headings, rows)}"
    )


def regret(record: Mapping[str, Any]) -> str:
    """Random drafts beside none."""
    columns = {
        "ours / no speculation": "ours_to_off",
        "ours / ours, pinned off": "ours_to_best_pinned",
        "ours, pinned off / no speculation": "pinned_off_to_off",
        "a second stock server / the first": "noise_floor",
        "p99 time between tokens, stock / ours": "p99_itl_off_to_ours",
        "the same, ours pinned off / ours": "p99_itl_pinned_off_to_ours",
    }
    cells = sorted(record["measured"], key=lambda cell: int(cell["users"]))
    rows = [["random tokens", str(cell["users"]), *(_ratio(cell[key]) for key in columns.values())] for cell in cells]
    return table(["drafter", "users", *columns], rows)


SOURCES = ("suffix", "model", "hybrid")


def drafters(record: Mapping[str, Any]) -> str:
    """What is accepted of each drafter's tokens, by class of prompt, with one user."""
    rows = []
    for cell in record["measured"]:
        if cell["users"] != 1:
            continue
        accepted = []
        for source in SOURCES:
            shares = [f"{cell['acceptance_by_position'][source][place]:.2f}" for place in (0, 1, 3, 7)]
            accepted.append(f"{cell['accepted_a_step'][source]:.2f} ({' '.join(shares)})")
        rows.append([cell["class"], *accepted])
    return table(["prompts", *(f"`{source}` accepts" for source in SOURCES)], rows)


def sources(record: Mapping[str, Any]) -> str:
    """How fast drafters are in one and the same process, and how much anybody could gain there."""
    rows = []
    for cell in record["measured"]["classes"]:
        speeds = [f"{cell['arms'][arm]['tokens_per_second']['median']:.0f}" for arm in ("off", *SOURCES)]
        limit = cell.get("limit_foreseeing")
        rows.append([cell["class"], *speeds, _ratio(cell["hybrid_to_better"]), f"{limit:.2f}" if limit else ""])
    headings = [
        *("prompts", "no drafts, tok/s", *(f"`{source}`" for source in SOURCES)),
        *("`hybrid` / the better of the two", "at most, all acceptance foreseen"),
    ]
    return table(headings, rows)


def block_gain(record: Mapping[str, Any]) -> str:
    """How many of the same drafts are kept, `block` against `token`."""
    lengths = (2, 4, 6, 8)
    rows = []
    for text in ("code", "structured"):
        cells = {cell["draft_length"]: cell for cell in record["measured"] if cell["text"] == text}
        rows.append([text, *(_gain(cells[length]) for length in lengths)])
    return table(["draft length", *map(str, lengths)], rows)


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "bench": ("bench_demo.json", bench),
    "regret": ("regret_hopeless.json", regret),
    "drafters": ("drafters.json", drafters),
    "sources": ("drafter_limit.json", sources),
    "block_gain": ("block_gain.json", block_gain),
}
"""By the name in the markers: file and how it is shown."""


def updated(readme: str, results: Path = RESULTS) -> str:
    """The README with its tables made anew; raises SystemExit when a table has no place."""
    found = []

    def block(match: re.Match[str]) -> str:
        name = match[1]
        found.append(name)
        file, show = TABLES[name]
        made = show(json.loads((results / file).read_text(encoding="utf-8")))
        return f"<!-- table: {name} -->\n{made}\n<!-- end of table -->"

    written = BLOCK.sub(block, readme)
    for name in TABLES:
        if name not in found:
            raise SystemExit(f"README.md has no place for a table: <!-- table: {name} --> … <!-- end of table -->")
    return written


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    readme = README.read_text(encoding="utf-8")
    wanted = updated(readme)
    if options.check:
        sys.exit(wanted != readme)
    README.write_text(wanted, encoding="utf-8")


def _ratio(interval: Mapping[str, float]) -> str:
    return f"{interval['median']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def _gain(cell: Mapping[str, Any]) -> str:
    percent = {key: 100 * (value - 1) for key, value in cell["gain"].items()}
    return (
        f"{cell['kept_by_token']:.2f} → {cell['kept_by_block']:.2f} "
        f"(+{percent['mean']:.1f} % [{percent['low']:.1f}, {percent['high']:.1f}])"
    )


if __name__ == "__main__":
    main()
