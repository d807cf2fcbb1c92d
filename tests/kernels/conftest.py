"""Kernel inputs differ between runs; the seed that reproduces them is printed."""

from __future__ import annotations

import os
import random

import pytest

VARIABLE = "KERNEL_SEED"
SEED = int(os.environ.get(VARIABLE) or random.SystemRandom().randrange(2**31))


def pytest_report_header() -> str:
    return f"kernel inputs: {VARIABLE}={SEED}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.failed:
        report.sections.append(("kernel inputs", f"{VARIABLE}={SEED}"))
    return report


@pytest.fixture
def numbers(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of this run and test, independent of the other tests."""
    return random.Random(f"{SEED} {request.node.path.stem} {request.node.name}")
