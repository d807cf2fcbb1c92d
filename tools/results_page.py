#!/usr/bin/env python3
"""Write the tables of ``docs/results.md`` and of the README from the files in ``benchmarks/results``.

    .venv/bin/python tools/results_page.py [--check]

A table stands between two markers, ``<!-- table: NAME -->`` and ``<!-- end of table -->``; only that is replaced.
``<!-- table: runs of FILE -->`` lists the runs of a result file. ``--check`` exits with 1 if something would change.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from result_summary import summary  # noqa: E402
from result_tables import runs_of, runs_table  # noqa: E402
from result_tables_by_part import ALL_TABLES  # noqa: E402

PAGES = ("docs/results.md", "README.md")
RESULTS = ROOT / "benchmarks/results"
BLOCK = re.compile(r"<!-- table: ([\w ]+) -->\n.*?<!-- end of table -->", re.DOTALL)


def updated(page: str, results: Path = RESULTS) -> str:
    """The page with its tables made anew; raises SystemExit for a table that does not exist."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        file = ALL_TABLES[name][0] if name in ALL_TABLES else name.removeprefix("runs of ")
        named = name in ALL_TABLES or name.startswith("runs of ")
        if named and not (results / f"{file}.json").exists():
            made = "Not measured yet."
        elif name.startswith("runs of "):
            made = runs_table(runs_of(results, file))
        elif name == "summary":
            made = summary(results)
        elif name in ALL_TABLES:
            made = ALL_TABLES[name][1](runs_of(results, file))
        else:
            raise SystemExit(f"no table is called {name}; there are {', '.join(sorted(ALL_TABLES))}")
        if not made.partition("\n|---")[2].partition("\n")[2] and made.startswith("|"):
            made = "Not measured yet."  # the file holds other parts
        return f"<!-- table: {name} -->\n{made}\n<!-- end of table -->"

    return BLOCK.sub(block, page)


def shown(page: str) -> set[str]:
    """Names of the tables on a page."""
    return {match[1] for match in BLOCK.finditer(page)}


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    changed = False
    for name in PAGES:
        path = ROOT / name
        page = path.read_text(encoding="utf-8")
        wanted = updated(page)
        changed |= wanted != page
        if not options.check:
            path.write_text(wanted, encoding="utf-8")
    sys.exit(options.check and changed)


if __name__ == "__main__":
    main()
