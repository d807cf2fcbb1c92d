"""The plugins ``fp8_fused`` and ``fp8``: their options and how they are built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from vllm_instant import Plugin, PluginContext, PluginOptions
from vllm_instant.interfaces.attention import AttentionProvider


class FusedOptions(PluginOptions):
    """Options of ``fp8_fused``."""

    longest_piece: int = Field(
        128,
        ge=0,
        description="Maximum number of prompt tokens per request and step for the fused kernels; steps with longer "
        "chunks use vLLM's own kernel.",
    )
    feed_forward: bool = Field(
        False,
        description="Whether the rest of each decoder layer runs as one fused operation in batches of up to 16 tokens.",
    )
    rotate: bool = Field(
        False,
        description="Whether queries and keys are rotated in the launch that writes the cache, instead of before it.",
    )


def _fused(options: FusedOptions, context: PluginContext) -> AttentionProvider:
    from vllm_instant_plugins.attention.fused import FusedAttention

    return FusedAttention(
        context.device, options.longest_piece, rotate=options.rotate, feed_forward=options.feed_forward
    )


def _fp8(options: PluginOptions) -> Mapping[str, Any]:
    return {"kv_cache_dtype": "fp8"}


PLUGINS = (
    Plugin(
        slot="attention",
        name="fp8_fused",
        summary="FP8 KV cache with one scale per token and head by fused kernels; NVIDIA GPUs from capability 8.9",
        lossy=True,
        options=FusedOptions,
        build=_fused,
    ),
    Plugin(
        slot="attention",
        name="fp8",
        summary="vLLM's own FP8 KV cache, also on CPUs",
        lossy=True,
        engine_arguments=_fp8,
    ),
)
