"""The second half of decoder layers, which plugins of the slot ``attention`` may compute too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeights:
    """Weights of a linear layer without bias: ``y = x @ (numbers * scales[:, None]).T``."""

    numbers: torch.Tensor
    """``[outputs, inputs]``, contiguous, in the model's dtype or ``float8_e4m3fn``."""
    scales: torch.Tensor | None = None
    """float32 ``[outputs]`` with FP8 weights; None otherwise."""


@dataclass(frozen=True, slots=True, eq=False)
class FeedForwardLayer:
    """Weights of the second half of one decoder layer.

    With the output ``a`` of attention and the residual stream ``r`` before it::

        x = r + output(a)
        g, u = gate_and_up(RMSNorm(x))
        d = down(silu(g) * u)
    """

    output: LinearWeights
    """``[H, A]``: output projection of the attention."""
    norm: torch.Tensor
    """``[H]``: weights of the RMSNorm."""
    epsilon: float
    """Epsilon of the RMSNorm, added to the mean of squares."""
    gate_and_up: LinearWeights
    """``[2 I, H]``: gate projection, then up projection."""
    down: LinearWeights
    """``[H, I]``: down projection."""
    dtype: torch.dtype
    """Dtype of the activations."""


@runtime_checkable
class FeedForwardProvider(Protocol):
    """Computes the second half of decoder layers in small batches. Runs in every worker process, under graph capture.

    Methods must not synchronize with the device. Larger batches, unsupported layers, and all layers after the plugin
    was disabled, are computed by vLLM's separate operations.
    """

    max_rows: int
    """Maximum number of rows; larger batches are left to vLLM."""

    def unsupported_reason(self, layer: FeedForwardLayer) -> str | None:
        """Return why a layer is not supported, as one sentence, or None. Called when the model is loaded."""
        ...

    def serve(
        self, layer: FeedForwardLayer
    ) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Return a function from ``(a, r)`` to ``(d, x)``, all ``[rows, ...]``, contiguous, in the layer's dtype.

        Called once per layer, before any graph is captured; allocate memory here. The function must return new
        tensors and leave ``a`` and ``r`` unchanged. Later the weights may be overwritten in place.
        """
        ...
