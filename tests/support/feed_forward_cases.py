"""The second half of a decoder layer in plain tensor operations, and calls of the kernels for other processes."""

from __future__ import annotations

import torch
from attention_reference import quantized

from vllm_instant_kernels.fused_feed_forward import (
    FeedForwardWeights,
    Weight,
    counters_for,
    feed_forward_parts,
    fused_feed_forward,
)

Matrix = tuple[torch.Tensor, torch.Tensor | None]


def matrices(seed: int, length: int, hidden: int, inner: int, fp8: bool, dtype: torch.dtype) -> list[Matrix]:
    """Numbers and scales of the three matrices; FP8 as bytes."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Matrix] = []
    for outputs, inputs in ((hidden, length), (2 * inner, hidden), (hidden, inner)):
        weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        made.append(quantized(weight) if fp8 else (weight.to(dtype), None))
    return made


def feed_forward_reference(
    attention: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, made: list[Matrix], epsilon: float
) -> torch.Tensor:
    """``fused_feed_forward`` in float64."""
    added, x = feed_forward_parts_reference(attention, residual, norm, made, epsilon)
    return x + added


def feed_forward_parts_reference(
    attention: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, made: list[Matrix], epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``feed_forward_parts`` in float64."""
    output, both, down = (
        numbers.double() if scales is None else numbers.view(torch.float8_e4m3fn).double() * scales.double()[:, None]
        for numbers, scales in made
    )
    x = residual.double() + attention.double() @ output.T
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * norm.double()
    gate, up = (normed @ both.T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ down.T, x


def fed_forward(
    attention: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    made: list[Matrix],
    splits: int,
    rounded_to: str = "",
) -> tuple[torch.Tensor, ...]:
    """``fused_feed_forward`` of a padded batch; ``rounded_to`` is the type of all but FP8 numbers."""
    weights = [Weight(*matrix) for matrix in made]
    if rounded_to:
        kind = getattr(torch, rounded_to)
        attention, residual, norm = (t.to(kind) for t in (attention, residual, norm))
        weights = [w if w.scales is not None else Weight(w.numbers.to(kind)) for w in weights]
    output, both, down = weights
    layer = FeedForwardWeights(output, norm, both, down, 1e-5)
    return (fused_feed_forward(attention, residual, layer, splits).float(),)


def fed_forward_parts(
    attention: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, made: list[Matrix], splits: int
) -> tuple[torch.Tensor, ...]:
    """Both parts of a second call with the counters of a first one, and the counters after it."""
    output, both, down = (Weight(*matrix) for matrix in made)
    layer = FeedForwardWeights(output, norm, both, down, 1e-5)
    counters = counters_for(residual.shape[1], residual.device)
    for _ in range(2):
        added, x = feed_forward_parts(attention, residual, layer, splits, counters)
    return added.float(), x.float(), counters
