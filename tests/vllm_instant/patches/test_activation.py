"""What a process loads when it is told to serve a deployment."""

import os
import subprocess
import sys

import pytest

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.settings import resolve

LOADED = (
    "import sys; from vllm_instant.register import register; register(); "
    "import vllm.v1.attention.backends.registry, vllm.v1.engine.output_processor; "
    "print([name for name in "
    "('numba', 'vllm_instant_plugins', 'vllm_instant.patches.scheduler') if name in sys.modules])"
)


@pytest.mark.engine
def test_a_worker_that_begins_loads_no_plugin(monkeypatch):
    """They bring Numba, with which a worker of vLLM's CPU build does not start."""
    monkeypatch.setenv(deployment_env.VARIABLE, "")
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "")
    slots = ("speculation.plugin=goodput", "batching.plugin=similarity", "attention.plugin=fp8")
    deployment_env.set_deployment(resolve(None, [*slots, "streaming.plugin=chunked"]))
    done = subprocess.run(
        [sys.executable, "-c", LOADED], env=dict(os.environ), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['vllm_instant.patches.scheduler']"
