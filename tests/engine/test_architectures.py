"""Models with recurrent layers start with the default deployment and answer as with vLLM alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.engine, pytest.mark.nightly]


@pytest.mark.parametrize("name", CONFIGS)
def test_recurrent_models_are_served_as_by_vllm_alone(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "architectures", name, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests/support")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone, ours = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert ours["scheduler"] == "InstantScheduler"
    assert not ours["speculates"], "a default must not depend on whether rejected drafts can be undone"
    assert ours["token_ids"] == alone["token_ids"]
    assert len({tuple(answer) for answer in alone["token_ids"]}) > 1, "the model tells the prompts apart"
