"""The API server: metrics on ``/metrics`` and routes under ``/v1/instant``.

Registered in vLLM's entry-point group ``vllm.endpoint_plugins``, which vLLM only loads when ``VLLM_PLUGINS`` (or
``--plugins``) names it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import GuardedPlugin, failure_counts
from vllm_instant.deployment.resolved import is_default_drafter
from vllm_instant.guard.service import GuardService
from vllm_instant.interfaces.deployment import Deployment, SlotChoice
from vllm_instant.metrics import InstantMetrics
from vllm_instant.patches import client_drafts, escalation, guard, streaming
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.engine_core import METHOD
from vllm_instant.patches.orphaned_processes import watch_parent
from vllm_instant.patches.plugin_factory import PluginStartError, uses_drafter_plugin

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger("vllm.instant")

POLL_SECONDS = 1.0
API_SERVER = "api server"
"""The value of the label ``engine`` for failures of plugins that run in the API server."""


class InstantEndpoints:
    """An endpoint plugin of vLLM."""

    name = "vllm_instant"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._polling: asyncio.Task[None] | None = None
        self._app: FastAPI | None = None
        self._streaming: Any = None
        self._escalation: Any = None
        self._client_drafts: Any = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, under ``/v1`` so that the API key protects them."""
        from vllm_instant.patches.http_handlers import ROUTES

        for path, handler, method in ROUTES:
            app.add_api_route(f"/v1/instant/{path}", handler, methods=[method], tags=["vllm-instant"])
        self._app = app
        if streaming.is_served(deployment_env.get_deployment()):
            self._streaming = streaming.attach(app)
        if escalation.is_served(deployment_env.get_deployment()):
            self._escalation = escalation.attach(app)
        if client_drafts.are_served(deployment_env.get_deployment()):
            self._client_drafts = client_drafts.attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Start to poll the engines; of several API servers only the first does, so that nothing is counted twice."""
        deployment = deployment_env.get_deployment()
        if deployment is None:
            return
        if self._app is not None:
            refuse_unguarded(getattr(args, "root_path", None), streaming.checked_keys(self._app))
        if engine_client is not None:
            deployment = as_served(deployment, engine_client.vllm_config.speculative_config)
        state.instant_deployment = deployment
        if engine_client is None:
            return
        watch_parent()
        chosen = ", ".join(f"{slot}={choice.plugin}" for slot, choice in deployment.slots.items())
        logger.info("Serving with vllm-instant: %s (from %s)", chosen, deployment.file or "defaults")
        reader = None
        if self._app is not None and self._streaming is not None:
            reader = streaming.start(self._streaming, self._app, engine_client, state, deployment, args)
        if self._app is not None and self._client_drafts is not None:
            policy = streaming.connection_policy(self._app, args)
            await client_drafts.start(self._client_drafts, engine_client, policy)
        judging = guard.service_of(engine_client)
        state.instant_guard = judging
        escalating = None
        if self._escalation is not None:
            escalating = escalation.start(self._escalation, engine_client.vllm_config, deployment)
        state.instant_escalation = escalating
        if engine_client.vllm_config.parallel_config._api_process_rank > 0:
            return
        metrics = InstantMetrics(deployment)
        self._polling = asyncio.get_running_loop().create_task(
            _poll(engine_client, metrics, reader, judging, escalating.guarded if escalating is not None else None)
        )


def refuse_unguarded(root_path: str | None, keys: Sequence[str]) -> None:
    """Refuse a ``--root-path`` with which vLLM's check of API keys passes over the routes.

    vLLM cuts the root path off the beginning of a path as plain text, the router at slashes only. With ``/`` or ``/v``
    the check looks at another path than the router.

    Raises:
        PluginStartError: The routes would answer without a key.

    """
    if not root_path or not keys:
        return
    for prefix in ("/v1", "/v2", "/inference", "/cohere"):
        if root_path != prefix and (prefix.startswith(root_path) or root_path.startswith(prefix)):
            raise PluginStartError(
                f"--root-path {root_path} switches vLLM's check of API keys off for {prefix}: use a path "
                "that shares no beginning with it, or none"
            )


def as_served(deployment: Deployment, speculative_config: Any) -> Deployment:
    """The deployment without the default drafter, if that does not draft on this server."""
    drafts = speculative_config is not None and uses_drafter_plugin(deployment, speculative_config)
    if drafts or not is_default_drafter(deployment):
        return deployment
    return deployment.model_copy(update={"slots": deployment.slots | {"drafter": SlotChoice(plugin="native")}})


async def _poll(
    engine_client: Any,
    metrics: InstantMetrics,
    reader: GuardedPlugin[Any] | None = None,
    judging: GuardService | None = None,
    escalating: GuardedPlugin[Any] | None = None,
) -> None:
    client = engine_client.engine_core
    failures = 0
    while failures < 3:
        try:
            totals = await client.call_utility_all_async(METHOD)
            for engine, of_engine in enumerate(totals):
                metrics.update(str(engine), of_engine)
            if judging is not None:
                judging.update_measures()
            in_this_process = (reader, judging.guarded if judging is not None else None, escalating)
            metrics.update(API_SERVER, {"failures": failure_counts(*in_this_process)})
            failures = 0
        except asyncio.CancelledError:
            raise
        # The server continues without metrics when an engine shuts down or answers differently.
        except Exception as error:
            failures += 1
            last = error
        await asyncio.sleep(POLL_SECONDS)
    if not getattr(engine_client, "errored", False):
        logger.warning("vllm_instant metrics stopped: the engine does not answer (%s: %s)", type(last).__name__, last)


PATCH = VllmPatch(
    name="http_routes",
    purpose="metrics and /v1/instant routes",
    requirements=(
        HasAttribute("plugins/endpoint_plugins/interface.py", "EndpointPlugin.required_tasks"),
        HasSignature("plugins/endpoint_plugins/interface.py", "EndpointPlugin.attach_router", ("self", "app")),
        HasSignature(
            "plugins/endpoint_plugins/interface.py",
            "EndpointPlugin.init_state",
            ("self", "engine_client", "state", "args"),
        ),
        References("v1/engine/async_llm.py", "AsyncLLM.__init__", ("engine_core", "vllm_config")),
        HasAttribute("config/parallel.py", "ParallelConfig._api_process_rank"),
    ),
    optional=True,
)
