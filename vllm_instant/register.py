"""The entry point ``vllm.general_plugins``: vLLM calls ``register`` once in each of its processes.

In the front end that is before its command line is parsed. In the engine core and the workers it is before the engine
is built, where the environment holds the deployment. Without a deployment only the flags are added.
"""

from __future__ import annotations


def register() -> None:
    """Add the flags, and activate the deployment of the environment, if any; idempotent."""
    from vllm_instant.deployment import deployment_env
    from vllm_instant.patches import activation, module_names

    module_names.hide_bare_folder()
    activation.offer_flags()
    if deployment_env.get_deployment() is not None:
        activation.activate()
