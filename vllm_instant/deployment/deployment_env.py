"""How a checked deployment reaches the engine-core and worker processes.

An environment variable: children of any start method inherit it, it is readable inside ``register()`` before any
engine object exists, and it is not part of vLLM's compilation cache key. Its name must not begin with ``VLLM_``, or
vLLM would warn about an unknown variable; Ray copies it because it is added to Ray's list.
"""

from __future__ import annotations

import os

from vllm_instant.interfaces.deployment import Deployment

VARIABLE = "INSTANT_SETTINGS"
_RAY_LIST = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


def set_deployment(deployment: Deployment) -> None:
    """Make a deployment the one that this process and its later children serve."""
    os.environ[VARIABLE] = deployment.model_dump_json()
    copied = [name for name in os.environ.get(_RAY_LIST, "").split(",") if name]
    if VARIABLE not in copied:
        os.environ[_RAY_LIST] = ",".join([*copied, VARIABLE])


def clear_deployment() -> None:
    """Forget the published deployment, so that later children start as stock vLLM."""
    os.environ.pop(VARIABLE, None)


def get_deployment() -> Deployment | None:
    """The deployment that this process serves, None without selection."""
    text = os.environ.get(VARIABLE)
    return Deployment.model_validate_json(text) if text else None
