"""The fused feed-forward kernels, for the plugin ``fp8_fused``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from vllm_instant.interfaces.feed_forward import FeedForwardLayer, FeedForwardProvider, LinearWeights
from vllm_instant_kernels.fused_feed_forward import (
    MAX_ROWS,
    FeedForwardWeights,
    Weight,
    counters_for,
    feed_forward_parts,
)

SPLITS = 4
"""Parts of the last product."""


class FusedFeedForward(FeedForwardProvider):
    """Three launches per layer, for batches of up to 16 rows.

    Args:
        interprets: whether the kernels run in Triton's interpreter.

    """

    def __init__(self, interprets: bool) -> None:
        self.max_rows = MAX_ROWS
        self._interprets = interprets

    def unsupported_reason(self, layer: FeedForwardLayer) -> str | None:
        if layer.dtype not in (torch.float16, torch.bfloat16) and not self._interprets:
            return f"the model computes in {layer.dtype}, and the kernels support float16 and bfloat16"
        hidden, inner = layer.down.numbers.shape
        if hidden % 16 or inner % 16:
            return f"the layer has sizes {hidden} and {inner}, and the kernels support multiples of 16"
        return None

    def serve(
        self, layer: FeedForwardLayer
    ) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        weights = FeedForwardWeights(
            self._weight(layer.output),
            layer.norm,
            self._weight(layer.gate_and_up),
            self._weight(layer.down),
            layer.epsilon,
        )
        # One set of counters per layer: different layers may run at the same time, the same layer does not.
        counters = counters_for(len(layer.norm), layer.norm.device)
        return partial(feed_forward_parts, weights=weights, splits=SPLITS, counters=counters)

    def _weight(self, weights: LinearWeights) -> Weight:
        numbers = weights.numbers
        # The interpreter has no FP8 type; the kernels convert uint8 with the same bytes themselves.
        if self._interprets and numbers.dtype == torch.float8_e4m3fn:
            numbers = numbers.view(torch.uint8)
        return Weight(numbers, weights.scales)
