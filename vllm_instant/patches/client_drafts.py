"""Drafts of clients: from the API server's route to the engine core, and with the plan of a step to the workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_instant.deployment import deployment_env
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.patches.engine_core import PUSH_METHOD
from vllm_instant.speculation.draft_plan import DraftPlan
from vllm_instant.speculation.pushed_drafts import PushedDrafts

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.v1.request import Request

    from vllm_instant.remote.pushing import ClientDrafts
    from vllm_instant.streaming.connections import ConnectionPolicy


def are_served(deployment: Deployment | None) -> bool:
    """Whether a deployment lets clients send drafts: its drafter has the option ``client_drafts``, switched on."""
    return deployment is not None and deployment.slots["drafter"].options.get("client_drafts") is True


class ClientDraftsMixin:
    """Adds the drafts of clients to the plans of steps; precedes vLLM's scheduler in the bases of a class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._instant_pushed = PushedDrafts() if are_served(deployment_env.get_deployment()) else None

    def add_request(self, request: Request) -> None:
        """Note the request's key."""
        if self._instant_pushed is not None:
            sampling = request.sampling_params
            self._instant_pushed.admit(request.request_id, sampling.extra_args if sampling is not None else None)
        super().add_request(request)  # type: ignore[misc]

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self._instant_pushed is not None:
            self._instant_pushed.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def instant_push_drafts(self, pushed: dict[str, list[Sequence[Any]]]) -> None:
        """Take drafts by key (called by ``patches.engine_core``)."""
        if self._instant_pushed is not None:
            self._instant_pushed.push(pushed)

    def instant_with_pushed(self, plan: DraftPlan) -> DraftPlan:
        """The plan with the drafts of its requests."""
        pushed = self._instant_pushed.take(plan.num_draft_tokens) if self._instant_pushed is not None else None
        return replace(plan, pushed=pushed) if pushed else plan


def attach(app: FastAPI) -> ClientDrafts:
    """Add the route to an API server; returns the object that ``start`` needs."""
    from vllm_instant.remote.pushing import ClientDrafts

    drafts = ClientDrafts()
    drafts.attach(app)
    return drafts


async def start(drafts: ClientDrafts, engine_client: Any, policy: ConnectionPolicy) -> None:
    """Start to serve the route."""
    from vllm_instant.remote.protocol import VERSION, Hello, tokenizer_fingerprint
    from vllm_instant.remote.pushing import ClientDraftMetrics

    model = engine_client.vllm_config.model_config
    fingerprint = ""
    if not model.skip_tokenizer_init and model.tokenizer:
        fingerprint = await asyncio.to_thread(tokenizer_fingerprint, model.tokenizer)
    client = engine_client.engine_core

    async def push(pushed: Any) -> None:
        await client.call_utility_all_async(PUSH_METHOD, pushed)

    drafts.start(push, Hello(VERSION, fingerprint, model.get_vocab_size()), policy, ClientDraftMetrics())
