"""The entry point ``vllm.general_plugins``: vLLM calls ``register`` once in each of its processes.

In the front end that is before its command line is parsed; in the engine core and the workers before the engine is
built, where a published deployment says what to activate. Without selection nothing but the flags is added.
"""

from __future__ import annotations


def register() -> None:
    """Offer the flags, and activate the deployment that a parent process published; idempotent."""
    from vllm_instant.deployment import deployment_env
    from vllm_instant.patches import activation, flags, module_names

    module_names.hide_bare_folder()
    flags.install(activation.serve)
    if deployment_env.get_deployment() is not None:
        activation.activate()
