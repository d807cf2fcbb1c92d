"""The API server's part: metrics on ``/metrics``, routes under ``/v1/instant``.

Registered in vLLM's entry-point group ``vllm.endpoint_plugins``, which vLLM only loads when ``VLLM_PLUGINS`` (or
``--plugins``) names it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException, Query, Request

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import GuardedPlugin, failure_counts
from vllm_instant.deployment.resolved import installed_plugin, is_default_drafter
from vllm_instant.interfaces.deployment import Deployment, SlotChoice
from vllm_instant.metrics import InstantMetrics
from vllm_instant.patches import streaming
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.engine_core import DECISIONS_METHOD, METHOD
from vllm_instant.patches.moe_reports import METHOD as EXPERTS_METHOD
from vllm_instant.patches.plugin_factory import uses_drafter_plugin

logger = logging.getLogger("vllm.instant")

POLL_SECONDS = 1.0
API_SERVER = "api server"
"""Where failures of plugins are counted that run in no engine."""


class InstantEndpoints:
    """What vLLM calls an endpoint plugin."""

    name = "vllm_instant"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._polling: asyncio.Task[None] | None = None
        self._app: FastAPI | None = None
        self._streaming: Any = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, under ``/v1`` so that the API key guards them."""
        for path, endpoint, method in (
            ("deployment", _show_deployment, "GET"),
            ("decisions", _show_decisions, "GET"),
            ("experts", _show_experts, "GET"),
            ("experts", _set_experts, "POST"),
        ):
            app.add_api_route(f"/v1/instant/{path}", endpoint, methods=[method], tags=["vllm-instant"])
        if streaming.is_served(deployment_env.get_deployment()):
            self._app, self._streaming = app, streaming.attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Start polling the engines; with several API servers only the first one does, so nothing counts twice."""
        deployment = deployment_env.get_deployment()
        if deployment is None:
            return
        if engine_client is not None:
            deployment = as_served(deployment, engine_client.vllm_config.speculative_config)
        state.instant_deployment = deployment
        if engine_client is None:
            return
        chosen = ", ".join(f"{slot}={choice.plugin}" for slot, choice in deployment.slots.items())
        logger.info("Serving with vllm-instant: %s (from %s)", chosen, deployment.file or "defaults")
        reader = None
        if self._app is not None:
            reader = streaming.start(self._streaming, self._app, engine_client, state, deployment)
        if engine_client.vllm_config.parallel_config._api_process_rank > 0:
            return
        metrics = InstantMetrics(deployment)
        self._polling = asyncio.get_running_loop().create_task(_poll(engine_client, metrics, reader))


async def _show_decisions(
    request: Request,
    last: Annotated[int, Query(ge=1, le=2048)] = 20,
    request_id: Annotated[str | None, Query()] = None,
    queue: Annotated[bool, Query()] = False,
) -> dict[str, Any]:
    """Why the newest draft lengths were chosen, by engine, the oldest first; optionally those of one request.

    With ``queue``: why requests started when they did.
    """
    client = request.app.state.engine_client.engine_core
    engines = await client.call_utility_all_async(DECISIONS_METHOD, last, request_id, queue)
    return {"engines": [{"engine": number, "decisions": decisions} for number, decisions in enumerate(engines)]}


async def _show_deployment(request: Request) -> dict[str, Any]:
    """The deployment that is served: effective values and where each came from."""
    deployment: Deployment | None = getattr(request.app.state, "instant_deployment", None)
    return deployment.model_dump(mode="json") if deployment is not None else {}


async def _show_experts(request: Request) -> dict[str, Any]:
    """What the experts plugin measured, by engine; nothing without one."""
    totals = await request.app.state.engine_client.engine_core.call_utility_all_async(METHOD)
    return {"engines": [of_engine.get("experts") for of_engine in totals]}


async def _set_experts(request: Request, settings: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
    """Hand settings to the experts plugin in all workers; the first one's answer, its layers included."""
    deployment: Deployment | None = getattr(request.app.state, "instant_deployment", None)
    if deployment is None or installed_plugin(deployment, "experts").plugin.build is None:
        raise HTTPException(404, "this server has no experts plugin")
    workers = await request.app.state.engine_client.collective_rpc(EXPERTS_METHOD, args=(settings,))
    if not workers or workers[0] is None:
        raise HTTPException(404, "no worker of this server asks an experts plugin")
    if "error" in workers[0]:
        raise HTTPException(400, workers[0]["error"])
    return dict(workers[0])


def as_served(deployment: Deployment, speculative_config: Any) -> Deployment:
    """The deployment without the default drafter where that does not draft."""
    drafts = speculative_config is not None and uses_drafter_plugin(deployment, speculative_config)
    if drafts or not is_default_drafter(deployment):
        return deployment
    return deployment.model_copy(update={"slots": deployment.slots | {"drafter": SlotChoice(plugin="native")}})


async def _poll(engine_client: Any, metrics: InstantMetrics, reader: GuardedPlugin[Any] | None = None) -> None:
    client = engine_client.engine_core
    failures = 0
    while failures < 3:
        try:
            totals = await client.call_utility_all_async(METHOD)
            for engine, of_engine in enumerate(totals):
                metrics.update(str(engine), of_engine)
            metrics.update(API_SERVER, {"failures": failure_counts(reader)})
            failures = 0
        except asyncio.CancelledError:
            raise
        # The server must outlive its metrics: an engine that shuts down, or a vLLM that answers differently.
        except Exception as error:
            failures += 1
            last = error
        await asyncio.sleep(POLL_SECONDS)
    if not getattr(engine_client, "errored", False):
        logger.warning("vllm_instant metrics stopped: the engine does not answer (%s: %s)", type(last).__name__, last)


PATCH = VllmPatch(
    name="endpoints",
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
