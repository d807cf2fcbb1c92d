"""Put the escalation in front of vLLM's chat and completion endpoints.

A middleware of the API server's application reads each request and lets the chosen end answer it
(``vllm_instant.escalation``). vLLM attaches endpoint plugins before it adds its own middleware, and Starlette puts
later ones outside, so that this one is inside of the check of API keys.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.resolved import plugin_options
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.escalation.deep_server import DeepServer
from vllm_instant.escalation.metrics import EscalationMetrics
from vllm_instant.escalation.middleware import EscalationMiddleware, Switch
from vllm_instant.escalation.service import EscalationService
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.interfaces.escalation import EscalationOptions
from vllm_instant.patches.compat import HasAttribute, HasSignature, HasStatements, References, VllmPatch
from vllm_instant.patches.plugin_factory import PluginStartError, build_guarded, context_of

if TYPE_CHECKING:
    from fastapi import FastAPI


def is_served(deployment: Deployment | None) -> bool:
    """Whether a deployment has an escalation; decided from the plugin's name alone, because every process asks."""
    return deployment is not None and deployment.slots["escalation"].plugin != SLOTS["escalation"].default


def attach(app: FastAPI) -> Switch:
    """Add the middleware to an API server; returns the object that ``start`` needs."""
    switch = Switch()
    app.add_middleware(EscalationMiddleware, switch=switch)
    return switch


def start(switch: Switch, vllm_config: Any, deployment: Deployment) -> EscalationService | None:
    """Start to decide; raises PluginStartError if the server cannot."""
    guarded = build_guarded("escalation", deployment, context_of(vllm_config, deployment))
    if guarded is None:
        return None
    options = plugin_options(deployment, "escalation")
    if not isinstance(options, EscalationOptions):
        raise PluginStartError(
            f"[escalation] plugin = {guarded.plugin!r} must derive its options from EscalationOptions"
        )
    deep = DeepServer(options, time.monotonic) if options.deep_url is not None else None
    switch.service = EscalationService(guarded, options, EscalationMetrics(guarded.plugin), deep)
    return switch.service


_APP = "entrypoints/launchers/app.py"

PATCH = VllmPatch(
    name="escalation",
    purpose="requests are answered by the end that the plugin chooses",
    requirements=(
        HasStatements(
            _APP,
            "build_app",
            (
                "attach_endpoint_plugins(app, supported_tasks)",
                "init_exception_handler(app)",
                "init_entrypoints_middleware(args, app, supported_tasks)",
            ),
        ),
        References("entrypoints/serve/middleware/authenticate.py", "AuthenticationMiddleware.__call__", ("root_path",)),
        HasSignature("entrypoints/serve/engine/serving.py", "BaseServing._base_request_id", ("raw_request", "default")),
        HasAttribute("entrypoints/openai/chat_completion/protocol.py", "ChatCompletionRequest.vllm_xargs"),
        HasAttribute("entrypoints/openai/completion/protocol.py", "CompletionRequest.vllm_xargs"),
    ),
    slots=("escalation",),
    is_wanted=lambda: is_served(deployment_env.get_deployment()),
)
