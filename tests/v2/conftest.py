"""Programs that need vLLM in a state that no other test may share: a pretended platform, Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from v2.generate import Job

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
Program = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.v2)


@pytest.fixture(scope="session")
def program() -> Program:
    """``program("dispatch", *words, VARIABLE=...)``: run a module of ``tests/support/v2`` and return its JSON.

    With ``lines``, the JSON of its last lines.
    """

    def run(
        module: str, *words: str, first_path: Path | None = None, lines: int | None = None, **environment: str
    ) -> Any:
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
        # Between its lines of JSON, vLLM may print others.
        printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return printed[-1] if lines is None else printed[-lines:]

    return run


@pytest.fixture(scope="session")
def generated(program: Program, plugin_folder: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """``generated(jobs, **environment)``: the results of ``v2.generate`` for jobs by name, all in one program."""

    def run(jobs: Mapping[str, Job], **environment: str) -> dict[str, dict[str, Any]]:
        words = [json.dumps(asdict(job)) for job in jobs.values()]
        results = program("generate", *words, first_path=plugin_folder, lines=len(words), **environment)
        return dict(zip(jobs, results, strict=True))

    return run
