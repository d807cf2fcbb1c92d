"""Adapt vLLM's chat endpoint and engine to ``vllm_instant.streaming``, which reads prompts while they arrive.

Prompts are rendered and answered by the object behind ``/v1/chat/completions``, so that a committed prompt is answered
as if it had been sent there. A prefill is a request for one token with the beginning of that prompt; it fills the
prefix cache. vLLM's request metrics must count neither prefills nor answers that were begun before their commit: their
bookkeeping continues with statistics that are discarded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.interfaces.streaming import EngineLoad, PinLimits, StreamingPrefill
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.engine_core import HOLD_METHOD, LET_GO_METHOD
from vllm_instant.patches.names import OUTPUT_PROCESSOR
from vllm_instant.patches.pinned_prefixes import HOLD
from vllm_instant.patches.plugin_factory import PluginStartError, build_guarded, context_of
from vllm_instant.streaming.engine import ChatRequest, CommitFlag, Prompt, RequestError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from vllm_instant.streaming.connections import ConnectionPolicy

logger = logging.getLogger("vllm.instant")

PREFILL_PREFIX = "instant-prefill-"
_EARLY_PREFIX = "instant-early-"
_EARLY: dict[str, CommitFlag] = {}
"""Answers that were begun before their commit, by request id."""
LOWEST_PRIORITY = 1_000_000
"""vLLM serves low numbers first, if its scheduling policy is ``priority``."""
_AUTHENTICATION = "AuthenticationMiddleware"


def is_served(deployment: Deployment | None) -> bool:
    """Whether a deployment prefills arriving prompts.

    Decided from the plugin's name alone, because every process asks: loading the plugins would load Numba, with which
    a worker of vLLM's CPU build does not start (see ``patches.cpu.numba_scan``).
    """
    return deployment is not None and deployment.slots["streaming"].plugin != SLOTS["streaming"].default


class VllmStreamingEngine:
    """The engine of one API server.

    Args:
        engine_client: vLLM's ``AsyncLLM``.
        chat: vLLM's ``OpenAIServingChat``.

    """

    def __init__(self, engine_client: Any, chat: Any) -> None:
        self._client = engine_client
        self._chat = chat
        config = engine_client.vllm_config
        self._max_running = config.scheduler_config.max_num_seqs
        self._block_size = config.cache_config.block_size or 16
        parallel = config.parallel_config
        shared = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
        self._ranks = 1 if shared else parallel.data_parallel_size
        self._prefills = 0
        self._early: list[CommitFlag] = []

    @property
    def block_size(self) -> int:
        return int(self._block_size)

    def load(self) -> EngineLoad:
        unfinished = self._client.get_num_unfinished_requests()
        ahead = self._prefills + sum(not early.committed for early in self._early)
        return EngineLoad(max(0, unfinished - ahead), self._max_running * self._ranks, ahead)

    async def render(self, request: ChatRequest) -> Prompt:
        from vllm.exceptions import GracefulHTTPError, VLLMClientError

        # Options of streams are refused in requests without a stream; the answer will be streamed.
        chat_request = self._chat_request({**request, "stream": True})
        try:
            rendered = await self._chat.render_chat_request(chat_request)
            if not isinstance(rendered, tuple):
                raise RequestError(rendered.error.message, int(rendered.error.code))
            lora = self._chat._maybe_get_adapters(chat_request, supports_default_mm_loras=True)
        except (VLLMClientError, GracefulHTTPError, ValueError) as error:
            raise RequestError(str(error)) from None
        _, inputs = rendered
        if len(inputs) != 1 or inputs[0].get("type") != "token":
            return Prompt([])
        return Prompt(list(inputs[0]["prompt_token_ids"]), (inputs[0].get("cache_salt"), lora))

    async def prefill(self, prompt: Prompt, length: int, affinity: int, session: str | None = None) -> None:
        from vllm.exceptions import GracefulHTTPError, VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        cache_salt, lora = prompt.handle
        # The one token is discarded, so that no drafts should follow it.
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"instant_speculation": "off", **_held(session)},
        )
        self._prefills += 1
        try:
            outputs = self._client.generate(
                tokens_input(prompt.token_ids[:length], cache_salt=cache_salt),
                params,
                f"{PREFILL_PREFIX}{uuid4().hex}",
                lora_request=lora,
                priority=LOWEST_PRIORITY,
                data_parallel_rank=self._rank(affinity),
            )
            async with aclosing(outputs):
                async for _ in outputs:
                    pass
        except (VLLMClientError, GracefulHTTPError) as error:
            raise RequestError(str(error)) from None
        finally:
            self._prefills -= 1

    async def answer(
        self, request: ChatRequest, affinity: int, commit: CommitFlag | None = None, session: str | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        from vllm.exceptions import GracefulHTTPError, VLLMClientError

        # The chat endpoint prefixes the id with "chatcmpl-".
        name = f"{_EARLY_PREFIX if commit is not None else 'instant-'}{uuid4().hex}"
        extra = {**(request.get("vllm_xargs") or {}), **_held(session)}
        own = {"stream": True, "request_id": name} | ({"vllm_xargs": extra} if extra else {})
        chat_request = self._chat_request({**request, **own})
        if commit is not None:
            _EARLY[f"chatcmpl-{name}"] = commit
            self._early.append(commit)
        try:
            lines = await self._chat.create_chat_completion(chat_request, self._raw_request(affinity))
            if not hasattr(lines, "__aiter__"):
                raise RequestError(lines.error.message, int(lines.error.code))
            async with aclosing(lines):
                async for line in lines:
                    data = line.removeprefix("data:").strip()
                    if not data or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise RequestError(chunk["error"]["message"], int(chunk["error"].get("code") or 500))
                    yield chunk
        except (VLLMClientError, GracefulHTTPError, ValueError) as error:
            raise RequestError(str(error)) from None
        finally:
            if commit is not None:
                self._early.remove(commit)
                _EARLY.pop(f"chatcmpl-{name}", None)

    async def pin(self, name: str, limits: PinLimits) -> str | None:
        arguments = (name, limits.max_sessions, limits.max_tokens, limits.max_cache_share)
        answers = await self._client.engine_core.call_utility_all_async(HOLD_METHOD, *arguments)
        # With several engines the session's affinity chooses one; the others hold nothing.
        return next((unsupported_reason for unsupported_reason in answers if unsupported_reason is not None), None)

    async def unpin(self, name: str) -> None:
        await self._client.engine_core.call_utility_all_async(LET_GO_METHOD, name)

    def _chat_request(self, request: ChatRequest) -> Any:
        from pydantic import ValidationError
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        try:
            return ChatCompletionRequest.model_validate(dict(request))
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join(str(part) for part in detail["loc"]) or "the request"
            raise RequestError(f"{where}: {detail['msg']}") from None

    def _rank(self, affinity: int) -> int | None:
        return affinity % self._ranks if self._ranks > 1 else None

    def _raw_request(self, affinity: int) -> Any:
        """A request whose header carries the data-parallel rank to the chat endpoint; None with one rank."""
        rank = self._rank(affinity)
        if rank is None:
            return None
        from starlette.requests import Request

        headers = [(b"x-data-parallel-rank", str(rank).encode())]
        return Request({"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b""})


def _held(session: str | None) -> dict[str, str]:
    return {HOLD: session} if session is not None else {}


def attach(app: FastAPI) -> Any:
    """Add the routes to an API server; returns the object that ``start`` needs."""
    from vllm_instant.streaming.routes import Streaming
    from vllm_instant.streaming.tokens import SessionTokens

    streaming = Streaming(SessionTokens())
    streaming.attach(app)
    return streaming


def start(
    streaming: Any, app: FastAPI, engine_client: Any, state: Any, deployment: Deployment, args: Any = None
) -> GuardedPlugin[StreamingPrefill] | None:
    """Start to serve; returns the plugin. Raises PluginStartError if the server cannot."""
    from vllm_instant.streaming.metrics import StreamingMetrics
    from vllm_instant.streaming.session_manager import SessionManager

    config = engine_client.vllm_config
    plugin = build_guarded("streaming", deployment, context_of(config, deployment))
    if plugin is None:
        return None
    if not config.cache_config.enable_prefix_caching:
        raise PluginStartError(
            f"plugin {plugin.plugin} of slot streaming cannot start: it reads ahead into the prefix cache, "
            "which is off; remove --no-enable-prefix-caching"
        )
    chat = getattr(state, "openai_serving_chat", None)
    if chat is None:
        raise PluginStartError(
            f"plugin {plugin.plugin} of slot streaming cannot start: this model has no /v1/chat/completions"
        )
    keys = checked_keys(app)
    manager = SessionManager(VllmStreamingEngine(engine_client, chat), plugin, StreamingMetrics())
    streaming.start(manager, connection_policy(app, args))
    if keys:
        _accept_session_tokens(app, streaming, keys)
    return plugin


def connection_policy(app: FastAPI, args: Any) -> ConnectionPolicy:
    """How an API server tells clients apart, and which connections web pages may open."""
    from vllm_instant.streaming.connections import ConnectionPolicy

    return ConnectionPolicy(bool(checked_keys(app)), tuple(getattr(args, "allowed_origins", None) or ()))


def checked_keys(app: FastAPI) -> list[str]:
    """The API keys that vLLM checks; empty without a check."""
    for middleware in app.user_middleware:
        if getattr(middleware.cls, "__name__", "") == _AUTHENTICATION:
            return list(cast(list[str], middleware.kwargs["tokens"]))
    return []


def _accept_session_tokens(app: FastAPI, streaming: Any, keys: list[str]) -> None:
    """Put the session tokens before the API-key check."""
    from vllm_instant.streaming.routes import DEMO_PATH
    from vllm_instant.streaming.tokens import AuthMiddleware

    public = (DEMO_PATH,) if streaming.manager.limits.demo_page else ()
    # Outermost: vLLM has built its middleware stack by now.
    stack = app.middleware_stack or app.build_middleware_stack()
    app.middleware_stack = AuthMiddleware(stack, tokens=streaming.tokens, keys=keys, public=public)


def _is_counted(request_id: str) -> bool:
    """Whether a request belongs to a client's committed prompt, so that metrics count it."""
    if request_id.startswith(PREFILL_PREFIX):
        return False
    early = _EARLY.get(request_id)
    return early is None or early.committed


def _update_stats_from_output(
    update: Any, processor: Any, req_state: Any, output: Any, timestamp: Any, stats: Any, *args: Any, **kwargs: Any
) -> None:
    if stats is not None and not _is_counted(req_state.external_req_id):
        stats = type(stats)()
    update(req_state, output, timestamp, stats, *args, **kwargs)


def _update_stats_from_finished(
    update: Any, processor: Any, req_state: Any, finish_reason: Any, stats: Any, *args: Any, **kwargs: Any
) -> None:
    if stats is not None and not _is_counted(req_state.external_req_id):
        stats = type(stats)()
    update(req_state, finish_reason, stats, *args, **kwargs)


_CHAT = "entrypoints/openai/chat_completion/serving.py"

PATCH = VllmPatch(
    name="streaming",
    purpose="reads prompts ahead while they arrive, and answers them as the chat endpoint would",
    requirements=(
        HasSignature(_CHAT, "OpenAIServingChat.render_chat_request", ("self", "request"), exact=True),
        HasSignature(_CHAT, "OpenAIServingChat.create_chat_completion", ("self", "request", "raw_request"), exact=True),
        HasSignature(
            "entrypoints/serve/engine/serving.py",
            "BaseServing._maybe_get_adapters",
            ("self", "request", "supports_default_mm_loras"),
            exact=True,
        ),
        References(_CHAT, "OpenAIServingChat._create_chat_completion", ("_get_data_parallel_rank", "request_id")),
        HasSignature(
            "v1/engine/async_llm.py", "AsyncLLM.generate", ("self", "prompt", "sampling_params", "request_id")
        ),
        HasSignature("v1/engine/async_llm.py", "AsyncLLM.get_num_unfinished_requests", ("self",), exact=True),
        HasSignature("inputs/engine.py", "tokens_input", ("prompt_token_ids",), exact=True),
        HasSignature(
            "v1/engine/output_processor.py",
            "OutputProcessor._update_stats_from_output",
            ("self", "req_state", "engine_core_output", "engine_core_timestamp", "iteration_stats"),
        ),
        HasSignature(
            "v1/engine/output_processor.py",
            "OutputProcessor._update_stats_from_finished",
            ("self", "req_state", "finish_reason", "iteration_stats"),
        ),
        HasSignature(
            "entrypoints/serve/middleware/authenticate.py",
            "AuthenticationMiddleware.__init__",
            ("self", "app", "tokens"),
        ),
        HasAttribute("config/parallel.py", "ParallelConfig.data_parallel_external_lb"),
        HasAttribute("config/parallel.py", "ParallelConfig.data_parallel_hybrid_lb"),
        HasAttribute("config/cache.py", "CacheConfig.block_size"),
        HasAttribute("config/cache.py", "CacheConfig.enable_prefix_caching"),
        HasAttribute("exceptions.py", "VLLMClientError"),
        HasAttribute("exceptions.py", "GracefulHTTPError"),
    ),
    slots=("streaming",),
    wraps={
        f"{OUTPUT_PROCESSOR}:OutputProcessor._update_stats_from_output": _update_stats_from_output,
        f"{OUTPUT_PROCESSOR}:OutputProcessor._update_stats_from_finished": _update_stats_from_finished,
    },
    is_wanted=lambda: is_served(deployment_env.get_deployment()),
)
