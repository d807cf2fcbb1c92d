"""Programs that need vLLM in a state that no other test may share: a pretended platform, Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
Program = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.v2)


@pytest.fixture(scope="session")
def program() -> Program:
    """``program("dispatch", *words, VARIABLE=...)``: run a module of ``tests/support/v2`` and return its JSON."""

    def run(module: str, *words: str, first_path: Path | None = None, **environment: str) -> Any:
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path = [str(first_path or ""), str(ROOT / "tests/support"), *inherited]
        done = subprocess.run(
            [sys.executable, "-m", f"v2.{module}", *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **environment},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
