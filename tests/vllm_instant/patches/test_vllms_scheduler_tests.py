"""vLLM's own tests of its schedulers, on this package's scheduler classes with the policy ``fixed``."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from fnmatch import fnmatch
from pathlib import Path

import pytest
from vllm_releases import OLDEST, own_tests
from vllms_schedulers import write_model

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

SUPPORT = Path(__file__).parents[2] / "support"
# Without spec_decode/test_dynamic_sd.py, which says how many drafts vLLM would choose.
FILES = (
    "v1/core/test_scheduler.py",
    "v1/core/test_async_scheduler.py",
    "v1/core/test_priority_scheduler_random.py",
    "v1/core/test_priority_preemption_bug.py",
    "v1/core/test_deferred_block_free.py",
    "v1/core/test_prefix_replay.py",
    "v1/core/test_swa_inflight_window_free.py",
    "v1/streaming_input/test_scheduler_streaming.py",
    "v1/spec_decode/test_dflash_lookahead.py",
)


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """``passed("1")``: the names of vLLM's tests that pass on this package's classes; ``passed("")``: on vLLM's own."""
    package = own_tests(OLDEST)
    if package is None:
        pytest.skip(f"the source distribution of vLLM {OLDEST} cannot be downloaded")

    def run(ours: str) -> set[str]:
        folder = tmp_path_factory.mktemp("run")
        write_model(folder)
        report = folder / "report.xml"
        # A model that is not there must not be looked for on the network.
        environment = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "INSTANT_SCHEDULERS": ours}
        path = os.pathsep.join([str(package), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "vllms_schedulers", "-p", "no:cacheprovider", "--noconftest"]
            + ["--import-mode=importlib", f"--rootdir={package}", "-c", os.devnull, f"--junitxml={report}"]
            + [str(package / "tests" / file) for file in FILES],
            cwd=folder,
            env={**os.environ, **environment, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert report.exists(), done.stdout[-2000:] + done.stderr[-2000:]
        cases = ElementTree.parse(report).iter("testcase")  # noqa: S314 - pytest wrote it
        return {f"{case.get('classname')}.{case.get('name')}" for case in cases if not len(case)}

    return run


OTHERWISE_ON_PURPOSE = {
    "test_spec_decode_padding_*": "requests are not padded to the largest number of drafts",
    "test_abort_request_when_structured_output_fsm_cannot_advance": "makes a scheduler without its constructor",
}


def test_what_passes_on_vllms_schedulers_passes_on_ours(passed):
    stock, ours = passed(""), passed("1")
    assert len(stock) > 200
    failing = [name for name in sorted(stock - ours) if not _on_purpose(name)]
    if failing:
        pytest.fail("\n".join(failing))


def _on_purpose(name: str) -> bool:
    return any(fnmatch(name, f"*.{known}") for known in OTHERWISE_ON_PURPOSE)
