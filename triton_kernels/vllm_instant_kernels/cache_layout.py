"""The memory layout of the keys and values of one token and KV head in a paged cache.

With FP8 (E4M3) and one scale per token and head for keys and one for values, a row is::

    [ K: head bytes | V: head bytes | scale of K: float32 | scale of V: float32 | 8 bytes unused ]

``2 * head + 16`` bytes, so that for head sizes that are multiples of 16 every row, and V within it, is aligned to 16
bytes and the compiler can load 16 bytes at a time. With each scale directly behind its numbers, in parts of ``head +
4`` bytes, it would have to load single bytes. At a head size of 128 a row takes 272 bytes instead of the 512 of BF16, a
factor of 0.53.

Without scales (BF16, FP16, FP32) a row is ``[K | V]``.

Rows are addressed by block, position in the block and head, with any strides: ``split`` takes the cache in vLLM's
logical order ``[blocks, heads, block_size, row]`` and returns views of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALES_AND_PADDING = 16
"""Bytes per row after K and V."""


@dataclass(frozen=True)
class CacheViews:
    """The parts of a paged cache, all views of one tensor; K and V have the same strides, and so do the scales.

    Quantised K and V are ``float8_e4m3fn`` if the device converts them, ``uint8`` if the kernels do.
    """

    keys: torch.Tensor
    """``[blocks, block_size, heads, head]``, the last dimension contiguous."""
    values: torch.Tensor
    """The same shape."""
    key_scales: torch.Tensor | None = None
    """float32 ``[blocks, block_size, heads]``: a key is its stored number times its scale. None if not quantised."""
    value_scales: torch.Tensor | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values are FP8 numbers with scales."""
        return self.key_scales is not None


def row_bytes(head_size: int, element_bytes: int = 1) -> int:
    """Bytes of the keys and values of one token and head, including scales and padding.

    Args:
        head_size: elements of a key.
        element_bytes: 1 for FP8 with scales, otherwise the bytes of an element.

    """
    plain = 2 * head_size * element_bytes
    return plain + SCALES_AND_PADDING if element_bytes == 1 else plain


def split(cache: torch.Tensor, head_size: int, converts: bool | None = None) -> CacheViews:
    """Return views of a cache.

    Args:
        cache: ``[blocks, heads, block_size, row]`` with any strides but contiguous rows: a type of one byte for FP8
            with scales (``row`` is then ``row_bytes(head_size)``), otherwise the type of the elements (``row`` is then
            ``2 * head_size``).
        head_size: elements of a key.
        converts: whether the device converts FP8; by default determined from the device.

    Raises:
        ValueError: the cache is not as above or not aligned to 16 bytes.

    """
    expected = row_bytes(head_size) if cache.element_size() == 1 else 2 * head_size
    if cache.dim() != 4 or cache.shape[-1] != expected or cache.stride(-1) != 1:
        raise ValueError(
            f"a cache of shape {tuple(cache.shape)} and strides {cache.stride()} has no rows of {expected} elements of "
            f"{cache.dtype} for heads of {head_size}"
        )
    rows = cache.transpose(1, 2)
    if cache.element_size() > 1:
        return CacheViews(rows[..., :head_size], rows[..., head_size:])
    if head_size % 16 or any(step % 16 for step in (*cache.stride()[:3], cache.storage_offset())):
        raise ValueError(
            f"rows of this cache are not aligned to 16 bytes: head size {head_size}, strides "
            f"{cache.stride()}, offset {cache.storage_offset()}"
        )
    if converts is None:
        converts = cache.is_cuda and torch.cuda.get_device_capability(cache.device) >= (8, 9)
    # Through uint8: PyTorch does not allow every view of one 8-bit float type as another.
    stored = rows.view(torch.uint8).view(torch.float8_e4m3fn if converts else torch.uint8)
    floats = torch.empty(0, dtype=torch.float32, device=cache.device).set_(cache.untyped_storage())
    scales = [
        floats.as_strided(
            rows.shape[:3],
            [step // 4 for step in rows.stride()[:3]],
            (cache.storage_offset() + 2 * head_size) // 4 + position,
        )
        for position in range(2)
    ]
    return CacheViews(stored[..., :head_size], stored[..., head_size : 2 * head_size], *scales)
