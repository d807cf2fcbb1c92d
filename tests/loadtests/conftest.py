"""The load generator is always a process of its own, since Locust patches the process that it runs in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LOCUSTFILE = Path(__file__).resolve().parent.parent.parent / "loadtests" / "locustfile.py"
Locust = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def locust() -> Locust:
    """Run Locust with our locustfile and further words, without its web page."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ), check=False)

    return run
