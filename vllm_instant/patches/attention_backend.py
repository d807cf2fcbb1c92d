"""The attention backend that vLLM builds for layers of an attention plugin; loaded by vLLM, by its name.

vLLM's Triton backend with three differences: the plugin sets the length of cache rows, writes them, and computes the
attention. Metadata, CUDA graphs and steps that the plugin declines stay with vLLM, whose kernels read and write the
same cache through views.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from vllm._custom_ops import rotary_embedding
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.plain import truth
from vllm_instant.deployment.resolved import ATTENTION_ARGUMENTS
from vllm_instant.interfaces.attention import AttentionLayer, AttentionProvider, AttentionStep, CacheParts, Rotation
from vllm_instant.patches import attention


def _plugin() -> GuardedPlugin[AttentionProvider]:
    plugin = attention.provider()
    if plugin is None:
        raise RuntimeError("this attention backend needs a deployment whose attention plugin brings kernels")
    return plugin


class InstantAttentionBackend(TritonAttentionBackend):
    """The backend in vLLM's registry under the name ``CUSTOM``."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = [ATTENTION_ARGUMENTS["kv_cache_dtype"]]

    @staticmethod
    def get_name() -> str:
        return attention.PLACE

    @staticmethod
    def get_impl_cls() -> type[InstantAttentionImpl]:
        return InstantAttentionImpl

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Set the length of cache rows that the plugin asks for."""
        if spec.state_content_bytes is not None or not spec.kv_quant_mode.is_per_token_head:
            return spec
        return replace(spec, state_content_bytes=_plugin().instance.row_bytes(spec.head_size))


class InstantAttentionImpl(TritonAttentionImpl):
    """The attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plugin = _plugin()
        # vLLM's window excludes the newest token; -1 stands for no window.
        self.shape = AttentionLayer(
            num_query_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            scale=self.scale,
            window=self.sliding_window[0] + 1,
            soft_cap=float(self.logits_soft_cap),
        )
        self.is_plain = self.alibi_slopes is None and self.sinks is None and self.chunk_lookback < 0
        self.plugin.instance.prepare(self.shape)
        self._parts: CacheParts | None = None
        self._parts_of: tuple[int, Any] = (0, None)

    def parts(self, kv_cache: Any) -> CacheParts:
        """The plugin's views of the layer's cache, made once."""
        identity = (kv_cache.data_ptr(), kv_cache.shape)
        if self._parts is None or self._parts_of != identity:
            self._parts = self.plugin.instance.parts(kv_cache, self.shape)
            self._parts_of = identity
        return self._parts

    def _pth_key_value_caches(self, kv_cache: Any) -> tuple[Any, Any]:
        """The views of the cache for vLLM's own kernels."""
        parts = self.parts(kv_cache)
        self._k_scale_cache, self._v_scale_cache = parts.key_scales, parts.value_scales
        return parts.keys.view(self.fp8_dtype), parts.values.view(self.fp8_dtype)

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        parts = self.parts(kv_cache)

        def write(plugin: AttentionProvider) -> bool:
            plugin.write(key, value, parts, slot_mapping)
            return True

        if not self.plugin.call("write", write, False):
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def rotate_and_write(
        self,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        rotated: Any,
        rotation: Rotation,
        kv_cache: Any,
        slot_mapping: Any,
    ) -> None:
        """Rotate ``query`` into ``rotated``, which may be the same, and write rotated keys, and values, to the cache.

        The plugin does both in one launch; otherwise vLLM's rotation and ``do_kv_cache_update`` follow each other. Rows
        without a slot are padding and may stay unrotated.
        """
        parts, tokens = self.parts(kv_cache), slot_mapping.shape[0]
        of_slots = Rotation(rotation.positions[:tokens], rotation.cos_sin, rotation.is_neox)

        def write(plugin: AttentionProvider) -> bool:
            done = plugin.rotate_and_write(
                query[:tokens], key[:tokens], value[:tokens], rotated[:tokens], of_slots, parts, slot_mapping
            )
            return truth(done)

        if self.plugin.call("rotate_and_write", write, False):
            return
        if rotated is not query:
            rotated.copy_(query)
            key = key.clone()
        # In place. Two dimensions, because the CPU's kernel would read a dimension of heads as tokens.
        rows, keys = rotated.view(len(rotated), -1), key.view(len(key), -1)
        rotary_embedding(rotation.positions, rows, keys, self.head_size, rotation.cos_sin, rotation.is_neox)
        self.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def fused_rope_kvcache_supported(self) -> bool:
        """Answer vLLM's own fusion pass, which is enabled on ROCm only."""
        plugin = self.plugin.instance
        return plugin.rotates() and plugin.rotation_unsupported_reason(self.head_size, self.head_size, True) is None

    def do_rope_and_kv_cache_update(
        self,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        positions: Any,
        cos_sin_cache: Any,
        is_neox: bool,
        kv_cache: Any,
        layer_slot_mapping: Any,
    ) -> None:
        # Attention reads keys from the cache alone, so that ``key`` need not be rotated in place.
        rotation = Rotation(positions, cos_sin_cache, is_neox)
        self.rotate_and_write(layer, query, key, value, query, rotation, kv_cache, layer_slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any,
        output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> Any:
        if self._is_ours(attn_metadata) and output_scale is None and output_block_scale is None:
            parts = self.parts(kv_cache)
            tokens = attn_metadata.num_actual_tokens
            step = AttentionStep(
                query=query[:tokens],
                output=output[:tokens],
                block_tables=attn_metadata.block_table,
                lengths=attn_metadata.seq_lens,
                starts=attn_metadata.query_start_loc,
                max_query_tokens=attn_metadata.max_query_len,
            )
            if self.plugin.call("attend", lambda plugin: truth(plugin.attend(self.shape, parts, step)), False):
                return output
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )

    def _is_ours(self, metadata: Any) -> bool:
        """Whether the plugin's interface covers a step; without metadata vLLM only profiles memory."""
        return (
            metadata is not None
            and self.is_plain
            and metadata.causal is True
            and metadata.mm_prefix_range_tensor is None
            and metadata.rswa_prefix_lens is None
        )
