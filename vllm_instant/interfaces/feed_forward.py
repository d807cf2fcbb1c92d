"""The second half of decoder layers, which plugins of the slot ``attention`` may compute along with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeights:
    """Of one linear layer without a bias: ``y = x @ (numbers * scales[:, None]).T``."""

    numbers: torch.Tensor
    """``[outputs, inputs]``, contiguous; of the model's type, or ``float8_e4m3fn``."""
    scales: torch.Tensor | None = None
    """float32 ``[outputs]`` for FP8 numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class FeedForwardLayer:
    """The second half of one decoder layer, the same in every step.

    From the output ``a`` of attention and the residual stream ``r`` before it::

        x = r + output(a)
        d = down(silu(g) * u), g and u being the halves of gate_and_up(RMSNorm(x))
    """

    output: LinearWeights
    """``[H, A]``: the projection of the attention."""
    norm: torch.Tensor
    """``[H]``."""
    epsilon: float
    """What the norm adds to the mean of squares."""
    gate_and_up: LinearWeights
    """``[2 I, H]``, the gate first."""
    down: LinearWeights
    """``[H, I]``."""
    dtype: torch.dtype
    """Of activations."""


@runtime_checkable
class FeedForwardProvider(Protocol):
    """Computes the second half of decoder layers in small batches. Runs in every worker process, under graph capture.

    Nothing may be read back from the device. Larger batches, layers with an objection, and all of them once the
    plugin is disabled, are computed by vLLM's separate operations.
    """

    max_rows: int
    """Larger batches are not asked for."""

    def unsupported_reason(self, layer: FeedForwardLayer) -> str | None:
        """Why a layer cannot be served, one sentence; None if it can. Asked when the model is loaded."""
        ...

    def serve(
        self, layer: FeedForwardLayer
    ) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """What computes ``(d, x)`` from ``(a, r)``, all of them ``[rows, ...]``, contiguous and of the layer's type.

        Asked once a layer, before any graph is captured; memory is allocated here. What is computed must be new
        tensors: ``a`` and ``r`` stay as they are. Weights may later get other values in the same memory.
        """
        ...
