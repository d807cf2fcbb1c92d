"""A pytest plugin for vLLM's own tests: they run on this package's scheduler classes where INSTANT_SCHEDULERS is set.

    INSTANT_SCHEDULERS=1 pytest -p vllms_schedulers --noconftest tests/v1/core/test_scheduler.py

The policy is ``fixed``, which drafts what vLLM would draft.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

MODEL = "facebook/opt-125m"
"""The model of vLLM's scheduler tests, which read nothing but its configuration."""
CONFIGURATION = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "word_embed_proj_dim": 768,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}


def write_model(folder: Path) -> None:
    """Write the model's folder, which vLLM finds by its name in the current directory."""
    (folder / MODEL).mkdir(parents=True, exist_ok=True)
    (folder / MODEL / "config.json").write_text(json.dumps(CONFIGURATION))


def pytest_configure(config: pytest.Config) -> None:
    """Exchange vLLM's scheduler classes before its tests import them."""
    if os.environ.get("INSTANT_SCHEDULERS"):
        exchange()


def exchange() -> None:
    """Serve the defaults with the policy ``fixed``, and put this package's classes under vLLM's names."""
    from vllm.v1.core.sched import async_scheduler, diffusion_scheduler, scheduler

    from vllm_instant.deployment import deployment_env
    from vllm_instant.deployment.settings import resolve
    from vllm_instant.patches.scheduler import InstantMixin

    deployment_env.set_deployment(resolve(None, ("speculation.plugin=fixed",)))

    def ours(base: Any, asynchronous: bool) -> Any:
        return type(base.__name__, (InstantMixin, base), {"__module__": base.__module__, "_asynchronous": asynchronous})

    exchanged = {
        (module, name): ours(getattr(module, name), asynchronous)
        for module, name, asynchronous in (
            (scheduler, "Scheduler", False),
            (async_scheduler, "AsyncScheduler", True),
            (diffusion_scheduler, "DiffusionScheduler", False),
            (diffusion_scheduler, "DiffusionAsyncScheduler", True),
        )
    }
    for (module, name), cls in exchanged.items():
        setattr(module, name, cls)
