"""Attention in plain tensor operations as a plugin: what kernels inside vLLM are held against.

With the first-party feed-forward beside it, of which each call is written down.
"""

from pathlib import Path

from attention_reference import paged_attention_reference, write_reference

from vllm_instant.interfaces.attention import AttentionProvider, CacheParts
from vllm_instant_kernels.cache_layout import CacheViews, row_bytes, split
from vllm_instant_plugins.attention.feed_forward import FusedFeedForward


class PlainAttention(AttentionProvider):
    def unsupported_reason(self, head_size, dtype):
        return None

    def row_bytes(self, head_size):
        return row_bytes(head_size)

    def parts(self, cache, layer):
        views = split(cache, layer.head_size)
        return CacheParts(views.keys, views.values, views.key_scales, views.value_scales)

    def write(self, key, value, cache, slots):
        write_reference(key, value, _views(cache), slots)

    def attend(self, layer, cache, step):
        paged_attention_reference(
            step.query,
            _views(cache),
            step.block_tables,
            step.lengths,
            step.starts,
            step.output,
            scale=layer.scale,
            window=layer.window,
            soft_cap=layer.soft_cap,
        )
        return True


class WatchedAttention(PlainAttention):
    def __init__(self, calls):
        self.calls = Path(calls)

    def feed_forward(self):
        return WatchedFeedForward(self.calls)


class WatchedFeedForward(FusedFeedForward):
    """Writes a line a call: the hidden size of the layer, and rows."""

    def __init__(self, calls):
        super().__init__(interprets=True)
        self.calls = calls

    def serve(self, layer):
        compute = super().serve(layer)

        def watched(attention, residual):
            computed = compute(attention, residual)
            with self.calls.open("a") as file:
                file.write(f"{len(layer.norm)} {len(residual)}\n")
            return computed

        return watched


def _views(cache):
    return CacheViews(cache.keys, cache.values, cache.key_scales, cache.value_scales)
