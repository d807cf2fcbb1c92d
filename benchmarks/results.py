"""Result files: the numbers with the command, the versions, the machine and the date that they belong to."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def write(path: Path, measured: Any) -> None:
    """Write ``measured`` with its circumstances as JSON."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parent.parent
    record = {
        "command": shlex.join(["python", str(script.relative_to(root)), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": f"{_processor()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "vllm": version("vllm"),
            "torch": version("torch"),
            "vllm-instant": version("vllm-instant"),
        },
        "measured": measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, default=_plain) + "\n")
    print(f"wrote {path}")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
