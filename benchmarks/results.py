"""Result files: one per benchmark, a list of runs, each with command, date, commit, device and versions.

Importing this module also makes the tests' support modules importable, which some benchmarks share with the tests.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_instant.tools.measure.environment_info import environment_info

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SUPPORT = [str(ROOT / path) for path in ("tests/support", "tests/support/plugins")]
sys.path[:0] = [path for path in SUPPORT if path not in sys.path]


def write(path: Path, measured: Any, name: str = "", keys: Sequence[str] = (), any_name: bool = False) -> None:
    """Put a run into a result file.

    Args:
        path: the file; it is made if it does not exist.
        measured: what the run measured, as JSON types.
        name: the conditions of the run. The file's earlier run of this name is replaced.
        keys: names of fields that identify a cell of ``measured``, a list of mappings. With them, earlier runs of the
            same name keep the cells that this run did not measure again.
        any_name: whether earlier runs of other names lose the cells that were measured again, too.

    """
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    kept = [remaining(run, measured, keys) if any_name or run["name"] == name else run for run in runs]
    run = {"name": name, **environment_info(command()), "commit": commit(), "measured": measured}
    record = {"benchmark": path.stem, "runs": [*filter(None, kept), run]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, default=_plain) + "\n")
    print(f"wrote {path}")


def remaining(run: Mapping[str, Any], measured: Any, keys: Sequence[str]) -> dict[str, Any] | None:
    """An earlier run without the cells that were measured again; None when nothing remains."""
    if not keys:
        return None
    again = {tuple(cell.get(key) for key in keys) for cell in measured}
    cells = [cell for cell in run["measured"] if tuple(cell.get(key) for key in keys) not in again]
    return {**run, "measured": cells} if cells else None


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of all runs of a file, oldest run first, each with the run's name."""
    return [{"run": run["name"], **cell} for run in json.loads(path.read_text())["runs"] for cell in run["measured"]]


def python_path(*folders: str) -> str:
    """PYTHONPATH of a process that also finds modules in ``folders``."""
    return os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])


def command() -> str:
    """The command that runs now, as typed in the project's folder."""
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    return shlex.join(["python", str(script), *sys.argv[1:]])


def commit() -> str:
    """The commit that runs now, with "-dirty" where the working tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
