"""Handlers of the routes under ``/v1/instant``; imported in API servers only, because they need FastAPI."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Body, HTTPException, Query, Request

from vllm_instant.deployment.resolved import installed_plugin
from vllm_instant.deployment.secrets import masked_deployment
from vllm_instant.escalation.service import EscalationService
from vllm_instant.guard.service import GuardService
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.patches.decision_ids import for_clients
from vllm_instant.patches.engine_core import DECISIONS_METHOD, METHOD
from vllm_instant.patches.moe_reports import METHOD as EXPERTS_METHOD

SPACING_SECONDS = 0.2
"""Minimum time between two questions of clients to the engine, which answers them between its steps."""
MAX_WAITING = 8
"""Maximum number of questions that wait."""


class Questions:
    """Spaces the questions of all clients, so that the requests do not wait for the answers."""

    def __init__(self) -> None:
        self._next = 0.0
        self._waiting = 0

    async def turn(self) -> None:
        """Wait for the next question's time; raises HTTPException 429 where too many wait."""
        if self._waiting >= MAX_WAITING:
            raise HTTPException(429, "too many diagnostic requests; try again in a few seconds", {"Retry-After": "2"})
        now = asyncio.get_running_loop().time()
        begin = max(now, self._next)
        self._next = begin + SPACING_SECONDS
        self._waiting += 1
        try:
            await asyncio.sleep(begin - now)
        finally:
            self._waiting -= 1


async def _turn(request: Request) -> None:
    state = request.app.state
    questions = getattr(state, "instant_questions", None)
    if questions is None:
        questions = state.instant_questions = Questions()
    await questions.turn()


async def show_decisions(
    request: Request,
    last: Annotated[int, Query(ge=1, le=2048)] = 20,
    request_id: Annotated[str | None, Query()] = None,
    queue: Annotated[bool, Query()] = False,
) -> dict[str, Any]:
    """The newest decisions about draft budgets, by engine, oldest first; optionally those of one request.

    With ``queue``: the decisions about the start of requests. Requests are named by digests of their ids.
    """
    await _turn(request)
    client = request.app.state.engine_client.engine_core
    engines = await client.call_utility_all_async(DECISIONS_METHOD, last, request_id, queue)
    shown = [for_clients(decisions, request_id) for decisions in engines]
    return {"engines": [{"engine": number, "decisions": decisions} for number, decisions in enumerate(shown)]}


async def show_deployment(request: Request) -> dict[str, Any]:
    """The deployment that is served: effective values, secrets masked, and the source of each."""
    deployment: Deployment | None = getattr(request.app.state, "instant_deployment", None)
    return masked_deployment(deployment) if deployment is not None else {}


async def show_experts(request: Request) -> dict[str, Any]:
    """The numbers of the experts plugin by engine; null without one."""
    await _turn(request)
    totals = await request.app.state.engine_client.engine_core.call_utility_all_async(METHOD)
    return {"engines": [of_engine.get("experts") for of_engine in totals]}


async def set_experts(request: Request, settings: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
    """Pass settings to the experts plugin in all workers; returns the first worker's answer, its layers included.

    Any client may ask for the description (``{}``); everything else changes what all clients get, writes a file or
    resets numbers, and needs the operator's consent.
    """
    deployment: Deployment | None = getattr(request.app.state, "instant_deployment", None)
    if deployment is None or installed_plugin(deployment, "experts").plugin.build is None:
        raise HTTPException(404, "this server has no experts plugin")
    if settings and deployment.slots["experts"].options.get("adjustable") is not True:
        raise HTTPException(403, "only {} is allowed here unless the deployment file has [experts] adjustable = true")
    await _turn(request)
    workers = await request.app.state.engine_client.collective_rpc(EXPERTS_METHOD, args=(settings,))
    if not workers or workers[0] is None:
        raise HTTPException(404, "no worker of this server runs an experts plugin")
    if "error" in workers[0]:
        raise HTTPException(400, workers[0]["error"])
    return dict(workers[0])


async def show_guard(
    request: Request,
    last: Annotated[int, Query(ge=1, le=2048)] = 20,
    request_id: Annotated[str | None, Query()] = None,
) -> dict[str, Any]:
    """The newest texts that the guard of this API server has stopped or replaced, oldest first.

    Requests are named by digests of their ids; texts are shown only with ``[guard] log_text = true``.
    """
    await _turn(request)
    judging: GuardService | None = getattr(request.app.state, "instant_guard", None)
    if judging is None:
        raise HTTPException(404, "this server has no guard")
    return {"engines": [{"engine": 0, "decisions": for_clients(judging.decisions(last), request_id)}]}


async def show_escalation(
    request: Request,
    last: Annotated[int, Query(ge=1, le=2048)] = 20,
    request_id: Annotated[str | None, Query()] = None,
) -> dict[str, Any]:
    """Where the newest requests of this API server were answered and why, oldest first.

    Requests are named by digests of their ids.
    """
    await _turn(request)
    escalating: EscalationService | None = getattr(request.app.state, "instant_escalation", None)
    if escalating is None:
        raise HTTPException(404, "this server has no escalation")
    return {"engines": [{"engine": 0, "decisions": for_clients(escalating.decisions(last), request_id)}]}


ROUTES = (
    ("escalation", show_escalation, "GET"),
    ("guard", show_guard, "GET"),
    ("deployment", show_deployment, "GET"),
    ("decisions", show_decisions, "GET"),
    ("experts", show_experts, "GET"),
    ("experts", set_experts, "POST"),
)
