"""Passes a checked deployment to the engine-core and worker processes in an environment variable.

Children of any start method inherit it, ``register()`` can read it before any engine object exists, and it is not part
of vLLM's compilation cache key. Its name must not begin with ``VLLM_``, or vLLM would warn of an unknown variable. Ray
copies it because its name is added to the list of variables that Ray copies.
"""

from __future__ import annotations

import os

from vllm_instant.deployment.secrets import masked
from vllm_instant.interfaces.deployment import Deployment

REPORT_DRAFTS = "VLLM_INSTANT_REPORT_DRAFTS"
"""When set, responses report their accepted drafts although the user chose no level of per-request metrics.

Set for servers that tools start to measure them: vLLM's own option for it stops servers that do not speculate.
"""
VARIABLE = "INSTANT_SETTINGS"
_RAY_LIST = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


def set_deployment(deployment: Deployment) -> None:
    """Make this process and its future children serve ``deployment``."""
    # Only the command line's process needs keys and passwords of the [vllm] table; each child can read this variable.
    os.environ[VARIABLE] = deployment.model_copy(update={"vllm": masked(deployment.vllm)}).model_dump_json()
    copied = [name for name in os.environ.get(_RAY_LIST, "").split(",") if name]
    if VARIABLE not in copied:
        os.environ[_RAY_LIST] = ",".join([*copied, VARIABLE])


def clear_deployment() -> None:
    """Remove the deployment, so that future children start as plain vLLM."""
    os.environ.pop(VARIABLE, None)


def get_deployment() -> Deployment | None:
    """Return the deployment that this process serves; None for plain vLLM."""
    text = os.environ.get(VARIABLE)
    return Deployment.model_validate_json(text) if text else None
