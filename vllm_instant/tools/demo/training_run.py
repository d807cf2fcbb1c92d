"""Progress on the terminal while a recipe runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Recipe = Callable[[Path, Callable[[str, int, int, float], None]], dict[str, Any]]
"""(output folder, report of (name, step, steps, loss)) → the card of what was reached."""


def run(output: Path, recipe: Recipe) -> None:
    """Run a recipe into ``output`` and print what was reached."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, object] = {}

        def report(name: str, step: int, steps: int, loss: float) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=steps)
            progress.update(tasks[name], completed=step, description=f"{name} loss {loss:.3f}")  # type: ignore[arg-type]

        card = recipe(output, report)
    console.print_json(json.dumps(card["held_out"]))
