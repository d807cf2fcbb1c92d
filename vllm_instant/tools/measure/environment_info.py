"""The environment of a measurement: device, versions and date."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_instant.tools.measure.nvml import gpus


def environment_info(command: str) -> dict[str, Any]:
    """The machine and the installation, as JSON types.

    Args:
        command: the user's command line.

    """
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": device(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("vllm", "torch", "vllm-instant")},
        },
    }


def device() -> str:
    """The processor, and the GPUs where NVML finds them."""
    return ", ".join([f"{_processor()}, {os.cpu_count()} cores", *(gpu.name for gpu in gpus())])


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
