"""A plugin that fails while serving is disabled and no request fails; one that cannot start stops the server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import contained_faults
import pytest
from asking import ask_all, metrics_when
from deployments import RAISING

from vllm_instant.tools.measure.servers import ServerError, serving_environment


def test_failing_plugins_are_disabled_and_no_request_fails(launch, prompts, expected):
    with launch(RAISING) as server:
        assert ask_all(server, prompts) == expected
        totals = metrics_when(server, lambda now: now.get("vllm_instant:plugin_failures_total", 0) >= 2)
        log = server.log_text()
    assert totals["vllm_instant:plugin_failures_total"] == 2
    for slot, hook in (("speculation", "get_num_draft_tokens"), ("drafter", "propose")):
        records = [line for line in log.splitlines() if f"Plugin raising in slot {slot} raised in {hook}" in line]
        assert len(records) == 1
    assert "0 to 4 draft tokens were due, found 99" in log


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        pytest.param(
            "cannot_start",
            "plugin cannot_start of slot speculation cannot start: OSError: the model of this policy is not there",
            marks=pytest.mark.nightly,
        ),
        ("incomplete", "plugin incomplete of slot speculation cannot start: its object has no get_num_draft_tokens"),
    ],
)
def test_a_plugin_that_cannot_start_stops_the_server(launch, policy, sentence):
    deployment = f'[speculation]\nplugin = "{policy}"\n[drafter]\nplugin = "ngram"\n'
    with pytest.raises(ServerError) as caught, launch(deployment):
        pass
    assert sentence in caught.value.log
    if policy == "incomplete":
        assert "Plugin incomplete in slot speculation is lossy" in caught.value.log


def test_faults_of_all_kinds_in_one_engine_change_no_answer(demo_pair):
    """30 of the cells of tests/vllm_instant/deployment/test_containment.py, where the engine is a real one."""
    result = subprocess.run(
        [sys.executable, contained_faults.__file__, str(demo_pair.target), "30"],
        capture_output=True,
        text=True,
        env={**serving_environment(), "PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]},
        cwd=Path(contained_faults.__file__).parent,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(next(line for line in result.stdout.splitlines() if line.startswith('{"cells"')))["cells"]
    assert len(found) == 30
    assert [cell["cell"] for cell in found if not cell["equal"] or cell["left"]] == []
    assert sum(cell["disabled"] for cell in found) >= 9
