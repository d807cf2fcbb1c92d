"""Progress on the terminal while the recipe runs."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_instant.demo import recipe


def run(output: Path) -> None:
    """Train both models into ``output`` and print what was reached."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, object] = {}

        def report(name: str, step: int, steps: int, loss: float) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=steps)
            progress.update(tasks[name], completed=step, description=f"{name} loss {loss:.3f}")  # type: ignore[arg-type]

        card = recipe.run(output, report)
    console.print_json(json.dumps(card["held_out"]))
