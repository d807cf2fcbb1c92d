"""The attention plugin ``fp8_fused``: the Triton kernels over an FP8 KV cache."""

from __future__ import annotations

import torch
import triton

from vllm_instant.interfaces.attention import AttentionLayer, AttentionProvider, AttentionStep, CacheParts, Rotation
from vllm_instant.interfaces.feed_forward import FeedForwardProvider
from vllm_instant_kernels import cache_layout
from vllm_instant_kernels.attention_launch import Workspace
from vllm_instant_kernels.cache_layout import CacheViews
from vllm_instant_kernels.paged_attention import paged_attention, workspace_for
from vllm_instant_kernels.prefill_attention import prefill_attention
from vllm_instant_kernels.rope_quantize_write import quantize_write, rope_quantize_write
from vllm_instant_plugins.attention.feed_forward import FusedFeedForward

MAX_DECODE_QUERY_TOKENS = 16
"""Query tokens per request up to which a step counts as decode or verification."""
MAX_HEAD_SIZE = 256


class FusedAttention(AttentionProvider):
    """Writes the cache and computes attention with the fused kernels; steps with long prompt chunks are left to vLLM's.

    Args:
        device: ``cuda`` with compute capability 8.9 or later, or ``cpu`` in Triton's interpreter, for tests.
        max_chunk: query tokens per request up to which the fused kernels compute a step.
        rotate: whether queries and keys are rotated in the launch that writes the cache.
        feed_forward: whether the second half of decoder layers is fused as well.

    Raises:
        ValueError: the device does not support FP8.

    """

    def __init__(self, device: str, max_chunk: int, rotate: bool = False, feed_forward: bool = False) -> None:
        self._interprets = device == "cpu" and bool(triton.knobs.runtime.interpret)
        if not self._interprets:
            found = device
            if device == "cuda":
                major, minor = torch.cuda.get_device_capability()
                found = "" if (major, minor) >= (8, 9) else f"a GPU of compute capability {major}.{minor}"
            if found:
                raise ValueError(
                    f"it needs an NVIDIA GPU of compute capability 8.9 or later, found {found}; "
                    "choose attention.plugin=fp8 or native"
                )
        self._device = torch.device(device)
        self._max_chunk = max_chunk
        self._feed_forward = FusedFeedForward(self._interprets) if feed_forward else None
        self._rotates = rotate
        self._workspaces: dict[int, Workspace] = {}

    def unsupported_reason(self, head_size: int, dtype: torch.dtype) -> str | None:
        if head_size % 16 or not 32 <= head_size <= MAX_HEAD_SIZE:
            return f"the head size is {head_size}; supported are multiples of 16 from 32 to {MAX_HEAD_SIZE}"
        if dtype not in (torch.float16, torch.bfloat16) and not self._interprets:
            return f"the model computes in {dtype}; supported are float16 and bfloat16"
        return None

    def row_bytes(self, head_size: int) -> int:
        return cache_layout.row_bytes(head_size)

    def prepare(self, layer: AttentionLayer) -> None:
        if layer.head_size not in self._workspaces:
            self._workspaces[layer.head_size] = workspace_for(self._device, layer.head_size)

    def parts(self, cache: torch.Tensor, layer: AttentionLayer) -> CacheParts:
        views = cache_layout.split(cache, layer.head_size)
        if views.key_scales is None or views.value_scales is None:
            raise ValueError(f"the cache has type {cache.dtype}; it must be a type of one byte")
        return CacheParts(views.keys, views.values, views.key_scales, views.value_scales)

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: CacheParts, slots: torch.Tensor) -> None:
        quantize_write(key, value, _views(cache), slots)

    def rotates(self) -> bool:
        return self._rotates

    def rotation_unsupported_reason(self, head_size: int, rotary: int, is_neox: bool) -> str | None:
        if not is_neox:
            return "the model rotates neighbouring elements (GPT-J); supported is the rotation of halves (GPT-NeoX)"
        return None

    def rotate_and_write(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotated: torch.Tensor,
        rotation: Rotation,
        cache: CacheParts,
        slots: torch.Tensor,
    ) -> bool:
        if not (self._rotates and rotation.is_neox):
            return False
        # A single launch, so an error leaves nothing half done.
        rope_quantize_write(query, key, value, _views(cache), slots, rotation.positions, rotation.cos_sin, rotated)
        return True

    def attend(self, layer: AttentionLayer, cache: CacheParts, step: AttentionStep) -> bool:
        views, workspace = _views(cache), self._workspaces[layer.head_size]
        max_query_tokens = step.max_query_tokens
        if max_query_tokens <= MAX_DECODE_QUERY_TOKENS:
            paged_attention(
                step.query,
                views,
                step.block_tables,
                step.lengths,
                step.starts,
                step.output,
                max_query_tokens=max_query_tokens,
                scale=layer.scale,
                workspace=workspace,
                window=layer.window,
                soft_cap=layer.soft_cap,
            )
        # vLLM's kernel does not run in the interpreter.
        elif max_query_tokens <= self._max_chunk or self._interprets:
            prefill_attention(
                step.query,
                views,
                step.block_tables,
                step.lengths,
                step.starts,
                step.output,
                scale=layer.scale,
                workspace=workspace,
                window=layer.window,
                soft_cap=layer.soft_cap,
            )
        else:
            return False
        return True

    def feed_forward(self) -> FeedForwardProvider | None:
        return self._feed_forward


def _views(cache: CacheParts) -> CacheViews:
    return CacheViews(cache.keys, cache.values, cache.key_scales, cache.value_scales)
