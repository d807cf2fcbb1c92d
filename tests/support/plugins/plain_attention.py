"""Attention in plain tensor operations as a plugin: what kernels inside vLLM are held against."""

from attention_reference import paged_attention_reference, write_reference

from vllm_instant import AttentionProvider, CacheParts
from vllm_instant_kernels.cache_layout import CacheViews, row_bytes, split


class PlainAttention(AttentionProvider):
    def objection(self, head_size, dtype):
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


def _views(cache):
    return CacheViews(cache.keys, cache.values, cache.key_scales, cache.value_scales)
