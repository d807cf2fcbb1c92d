"""What an analysis says, as files: one HTML page, JSON for programs, JUnit XML for CI."""

from __future__ import annotations

from pathlib import Path

from vllm_instant_loadtests.analysis import Analysis
from vllm_instant_loadtests.recording import Run


def write_html(analysis: Analysis, run: Run, path: Path) -> None:
    """One self-contained page."""
    raise NotImplementedError


def write_json(analysis: Analysis, path: Path) -> None:
    """What ``Analysis.plain`` has."""
    raise NotImplementedError


def write_junit(analysis: Analysis, path: Path) -> None:
    """A test case a goal, and one a server for its spikes."""
    raise NotImplementedError
