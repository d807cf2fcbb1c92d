"""``fp8_fused``: the Triton kernels as an attention plugin."""

from __future__ import annotations

import torch
import triton

from vllm_instant.interfaces.attention import AttentionLayer, AttentionProvider, AttentionStep, CacheParts, Rotation
from vllm_instant.interfaces.feed_forward import FeedForwardProvider
from vllm_instant_kernels import cache_layout
from vllm_instant_kernels.attention_tiles import Workspace
from vllm_instant_kernels.cache_layout import CacheViews
from vllm_instant_kernels.paged_attention import paged_attention, workspace_for
from vllm_instant_kernels.prefill_attention import prefill_attention
from vllm_instant_kernels.rope_quantize_write import quantize_write, rope_quantize_write
from vllm_instant_plugins.attention.feed_forward import FusedFeedForward

MAX_VERIFIED = 16
"""Query tokens of a request up to which a step counts as decode or verification."""
LARGEST_HEAD = 256


class FusedAttention(AttentionProvider):
    """Writes and attends with our kernels; leaves steps with long pieces of prompts to vLLM's.

    Args:
        device: ``cuda`` with compute capability 8.9 or later, or ``cpu`` in Triton's interpreter, for tests.
        longest_piece: query tokens of a request up to which a step is attended here.
        rotate: whether queries and keys are rotated here, too, in the launch that writes.
        feed_forward: whether the second half of decoder layers is served, too.

    Raises:
        ValueError: the device has no FP8 numbers.

    """

    def __init__(self, device: str, longest_piece: int, rotate: bool = False, feed_forward: bool = False) -> None:
        self._interprets = device == "cpu" and bool(triton.knobs.runtime.interpret)
        if not self._interprets:
            found = device
            if device == "cuda":
                major, minor = torch.cuda.get_device_capability()
                found = "" if (major, minor) >= (8, 9) else f"a GPU of compute capability {major}.{minor}"
            if found:
                raise ValueError(
                    f"it needs an NVIDIA GPU of compute capability 8.9 or later, and this is {found}; "
                    "choose attention.plugin=fp8 or native"
                )
        self._device = torch.device(device)
        self._longest_piece = longest_piece
        self._feed_forward = FusedFeedForward(self._interprets) if feed_forward else None
        self._rotates = rotate
        self._workspaces: dict[int, Workspace] = {}

    def unsupported_reason(self, head_size: int, dtype: torch.dtype) -> str | None:
        if head_size % 16 or not 32 <= head_size <= LARGEST_HEAD:
            return f"heads are of size {head_size}, and it serves multiples of 16 from 32 to {LARGEST_HEAD}"
        if dtype not in (torch.float16, torch.bfloat16) and not self._interprets:
            return f"the model computes in {dtype}, and it serves float16 and bfloat16"
        return None

    def row_bytes(self, head_size: int) -> int:
        return cache_layout.row_bytes(head_size)

    def prepare(self, layer: AttentionLayer) -> None:
        if layer.head_size not in self._workspaces:
            self._workspaces[layer.head_size] = workspace_for(self._device, layer.head_size)

    def parts(self, cache: torch.Tensor, layer: AttentionLayer) -> CacheParts:
        views = cache_layout.split(cache, layer.head_size)
        if views.key_scales is None or views.value_scales is None:
            raise ValueError(f"the cache is of {cache.dtype}; it must be of a type of one byte")
        return CacheParts(views.keys, views.values, views.key_scales, views.value_scales)

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: CacheParts, slots: torch.Tensor) -> None:
        quantize_write(key, value, _views(cache), slots)

    def rotates(self) -> bool:
        return self._rotates

    def rotation_unsupported_reason(self, head_size: int, rotary: int, is_neox: bool) -> str | None:
        if not is_neox:
            return "they rotate neighbours in a head (GPT-J), and it rotates halves of a head (GPT-NeoX)"
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
        # A single launch: it happens or it does not.
        rope_quantize_write(query, key, value, _views(cache), slots, rotation.positions, rotation.cos_sin, rotated)
        return True

    def attend(self, layer: AttentionLayer, cache: CacheParts, step: AttentionStep) -> bool:
        views, workspace = _views(cache), self._workspaces[layer.head_size]
        most = step.max_query_tokens
        if most <= MAX_VERIFIED:
            paged_attention(
                step.query,
                views,
                step.block_tables,
                step.lengths,
                step.starts,
                step.output,
                max_query_tokens=most,
                scale=layer.scale,
                workspace=workspace,
                window=layer.window,
                soft_cap=layer.soft_cap,
            )
        # vLLM's kernel does not run in the interpreter.
        elif most <= self._longest_piece or self._interprets:
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
