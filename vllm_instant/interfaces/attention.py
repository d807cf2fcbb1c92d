"""The ``attention`` slot: the attention kernel and the KV-cache format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from vllm_instant.interfaces.feed_forward import FeedForwardProvider


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """Constants of one attention layer of the model."""

    num_query_heads: int
    """Number of query heads on this worker."""
    num_kv_heads: int
    """Number of KV heads on this worker."""
    head_size: int
    scale: float
    """Factor of the scores."""
    window: int = 0
    """Number of latest tokens that a token attends to, itself included; 0 for all."""
    soft_cap: float = 0.0
    """Soft cap ``c`` of the scores ``s``, which become ``c * tanh(s / c)``; 0 for none."""


@dataclass(frozen=True, slots=True)
class CacheParts:
    """Views of a layer's paged cache: keys and values in FP8 (E4M3), with one scale per token and head."""

    keys: torch.Tensor
    """float8_e4m3fn ``[blocks, block_size, KV heads, head_size]``, the last dimension contiguous."""
    values: torch.Tensor
    """Same shape and dtype as ``keys``."""
    key_scales: torch.Tensor
    """float32 ``[blocks, block_size, KV heads]``: a key is its stored value times its scale."""
    value_scales: torch.Tensor
    """float32, same shape as ``key_scales``."""


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Inputs of one layer in one step: causal attention of the newest tokens of the requests."""

    query: torch.Tensor
    """``[tokens, query heads, head_size]`` in the model's dtype, the requests concatenated."""
    output: torch.Tensor
    """Output buffer with the shape and dtype of ``query``."""
    block_tables: torch.Tensor
    """int32 ``[requests or more, blocks]``: block indices of each request."""
    lengths: torch.Tensor
    """int32 ``[requests]``: tokens in the cache, the new ones included; 0 for padding."""
    starts: torch.Tensor
    """int32 ``[requests + 1]``: the index of each request's first new token, then the number of new tokens."""
    max_query_tokens: int
    """Maximum number of new tokens per request, also for later replays of a CUDA graph that is captured now."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary position embedding of a batch of tokens."""

    positions: torch.Tensor
    """int64 ``[tokens]``."""
    cos_sin: torch.Tensor
    """``[positions, rotary]``: the cosines of ``rotary / 2`` angles, then their sines. Only the first ``rotary``
    elements of a head are rotated."""
    is_neox: bool
    """Whether element ``i`` is paired with ``i + rotary / 2`` (GPT-NeoX) or ``2i`` with ``2i + 1`` (GPT-J)."""


@runtime_checkable
class AttentionProvider(Protocol):
    """Attention over an FP8 cache whose layout it defines. Runs in every worker process, under graph capture.

    Methods must not synchronize with the device. vLLM's own kernels use the same cache through ``parts``: they run
    where ``attend`` returns False, and after the plugin was disabled.
    """

    def unsupported_reason(self, head_size: int, dtype: torch.dtype) -> str | None:
        """Return why such layers are not supported, as one sentence, or None. Called while the model is built."""
        ...

    def row_bytes(self, head_size: int) -> int:
        """Return the bytes of one token and KV head in the cache: key, value, scales and padding."""
        ...

    def prepare(self, layer: AttentionLayer) -> None:
        """Allocate the buffers of a layer, before any graph is captured. Optional."""
        return None

    def parts(self, cache: torch.Tensor, layer: AttentionLayer) -> CacheParts:
        """Return the parts of a cache uint8 ``[blocks, KV heads, block_size, row_bytes]`` with any strides."""
        ...

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: CacheParts, slots: torch.Tensor) -> None:
        """Quantize keys and values ``[tokens or more, KV heads, head_size]`` and write them to the cache.

        ``slots`` is int64 ``[tokens]``, the slot of each token; tokens with slot -1 are not written.
        """
        ...

    def rotates(self) -> bool:
        """Whether ``rotate_and_write`` replaces vLLM's rotary embedding and ``write``. Optional."""
        return False

    def rotation_unsupported_reason(self, head_size: int, rotary: int, is_neox: bool) -> str | None:
        """Return why a layer's rotation is not supported, as one sentence, or None.

        Called once per layer if ``rotates`` returns True.
        """
        return "the plugin implements no rotation"

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
        """Rotate queries into ``rotated``; rotate, quantize and write keys; write values as ``write`` does.

        ``query`` and ``rotated`` are ``[tokens, query heads, head_size]`` and may be the same tensor; ``key`` and
        ``value`` are ``[tokens, KV heads, head_size]``, ``slots`` is int64 ``[tokens]``. Returns False to leave the
        step to vLLM's rotation and ``write``; then, and after an exception, ``query`` and ``key`` must be unchanged.
        """
        return False

    def attend(self, layer: AttentionLayer, cache: CacheParts, step: AttentionStep) -> bool:
        """Write ``step.output`` and return True, or return False to leave the step to vLLM's kernel."""
        ...

    def feed_forward(self) -> FeedForwardProvider | None:
        """Return what computes the second half of decoder layers in small batches; None for vLLM. Optional."""
        return None
