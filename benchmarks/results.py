"""Result files: the numbers with the command, the versions, the machine and the date that they belong to."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vllm_instant.tools.measure.environment_info import environment_info

HERE = Path(__file__).resolve().parent


def write(path: Path, measured: Any) -> None:
    """Write ``measured`` with the environment that it was measured in as JSON."""
    record = environment_info(command()) | {"measured": measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, default=_plain) + "\n")
    print(f"wrote {path}")


def command() -> str:
    """The command that runs now, as from the project's top."""
    script = Path(sys.argv[0]).resolve().relative_to(Path(__file__).resolve().parent.parent)
    return shlex.join(["python", str(script), *sys.argv[1:]])


def earlier(path: Path) -> list[dict[str, Any]]:
    """What an earlier run has measured; nothing if there is no such file."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    origin = {"command": record["command"], "date": record["date"]}
    return [origin | cell for cell in record["measured"]]


def merged(kept: list[dict[str, Any]], new: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """New cells behind those of earlier runs whose ``keys`` they do not repeat, each with its command and date."""
    again = {tuple(cell[key] for key in keys) for cell in new}
    old = [cell for cell in kept if tuple(cell[key] for key in keys) not in again]
    return old + [cell | {"command": command(), "date": datetime.date.today().isoformat()} for cell in new]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
