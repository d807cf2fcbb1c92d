"""The ``attention`` slot: the attention kernel and the KV-cache format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from vllm_instant.interfaces.feed_forward import FeedForwardProvider


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What one attention layer of the model computes, the same in every step."""

    num_query_heads: int
    """On this worker, as is the next."""
    num_kv_heads: int
    head_size: int
    scale: float
    """What scores are multiplied with."""
    window: int = 0
    """Each token sees only so many, itself included; 0 is all."""
    soft_cap: float = 0.0
    """``c`` if scores ``s`` become ``c * tanh(s / c)``; 0 for none."""


@dataclass(frozen=True, slots=True)
class CacheParts:
    """Views of a layer's paged cache: FP8 numbers (E4M3) with one scale a token and head, for keys and for values."""

    keys: torch.Tensor
    """``[blocks, block_size, KV heads, head_size]``, one byte each, the last dimension contiguous."""
    values: torch.Tensor
    key_scales: torch.Tensor
    """float32 ``[blocks, block_size, KV heads]``: a key is its stored number times its scale."""
    value_scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What one layer attends to in one step: causal attention of the newest tokens of some requests."""

    query: torch.Tensor
    """``[tokens, query heads, head_size]``, all requests one after another."""
    output: torch.Tensor
    """The same shape; to be written."""
    block_tables: torch.Tensor
    """int32 ``[requests or more, blocks]``."""
    lengths: torch.Tensor
    """int32 ``[requests]``, tokens in the cache, the new ones included; 0 for padding."""
    starts: torch.Tensor
    """int32 ``[requests + 1]``, the first new token of each request, and their number."""
    max_query_tokens: int
    """No request has more new tokens, also whenever a CUDA graph that is captured now is replayed."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary position embedding of some tokens, by a table."""

    positions: torch.Tensor
    """Integers ``[tokens]``."""
    cos_sin: torch.Tensor
    """``[positions, rotary]``: cosines of ``rotary / 2`` angles, then their sines. What follows in a head stays."""
    is_neox: bool
    """Number ``i`` of a head goes with number ``i + rotary / 2`` (GPT-NeoX), or ``2i`` with ``2i + 1`` (GPT-J)."""


@runtime_checkable
class AttentionProvider(Protocol):
    """Attention over an FP8 cache whose rows it lays out. Runs in every worker process, under graph capture.

    Nothing may be read back from the device. vLLM's own kernels work on the same cache, through ``parts``: they take
    over where ``attend`` declines, and once the plugin is disabled.
    """

    def unsupported_reason(self, head_size: int, dtype: torch.dtype) -> str | None:
        """Why layers of this kind cannot be served, one sentence; None if they can. Asked while the model is built."""
        ...

    def row_bytes(self, head_size: int) -> int:
        """Bytes of one token's keys and values of one KV head, with all that belongs to them."""
        ...

    def prepare(self, layer: AttentionLayer) -> None:
        """Allocate what steps need: called for each layer before any graph is captured. Optional."""
        return None

    def parts(self, cache: torch.Tensor, layer: AttentionLayer) -> CacheParts:
        """Where the parts lie in a cache ``[blocks, KV heads, block_size, row_bytes]``, in any order of strides."""
        ...

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: CacheParts, slots: torch.Tensor) -> None:
        """Quantise and write ``[tokens or more, KV heads, head_size]`` to int64 ``slots`` ``[tokens]``; -1: nowhere."""
        ...

    def rotates(self) -> bool:
        """Whether ``rotate_and_write`` takes the place of vLLM's rotation and of ``write``. Optional."""
        return False

    def rotation_unsupported_reason(self, head_size: int, rotary: int, is_neox: bool) -> str | None:
        """Why it cannot for some layers, one sentence; None if it can. Asked once a layer, if ``rotates``."""
        return "it has no rotation"

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
        """Rotate queries into ``rotated``, and keys on their way to the cache, where values go as with ``write``.

        ``query`` and ``rotated`` are ``[tokens, query heads, head_size]`` and may be the same tensor; ``key`` and
        ``value`` are ``[tokens, KV heads, head_size]``, ``slots`` are ``[tokens]``. False leaves the step to vLLM's
        rotation and ``write``. Where it says False or raises, ``query`` and ``key`` must be what they were: they are
        rotated then.
        """
        return False

    def attend(self, layer: AttentionLayer, cache: CacheParts, step: AttentionStep) -> bool:
        """Write ``step.output``, or return False to leave the step to vLLM's kernel."""
        ...

    def feed_forward(self) -> FeedForwardProvider | None:
        """What computes the rest of decoder layers in small batches, too; None leaves it to vLLM. Optional."""
        return None
