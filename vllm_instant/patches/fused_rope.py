"""Fuse the rotary embedding of an attention plugin with its write to the KV cache.

vLLM's own fusion is a pass over compiled graphs, which it enables on ROCm only and which has no effect on eager models.
Here the loaded model is changed: an attention module whose ``forward`` passes its rotated queries and keys directly to
its attention gets a rotary embedding that defers the rotation, and an attention whose one operator rotates and writes.
No graph has to be matched, so that compiled and eager models behave alike.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.patches.compat import HasAttribute, HasSignature, HasStatements, References, VllmPatch
from vllm_instant.patches.names import MODEL_LOADER

logger = logging.getLogger("vllm.instant")

OPERATOR = "vllm_instant::rotate_and_write"
BESIDE = "vllm::unified_kv_cache_update"
"""The operator of vLLM that ours takes the place of. Where it splits graphs, so does ours."""
CACHE_KEY = "vllm_instant_rotation"
"""In ``additional_config``: separates compiled graphs with this package's operator from vLLM's in its compile cache."""


def _load_model(load: Any, loader: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    model = load(vllm_config, *args, **kwargs)
    # From the name alone: a server without an attention plugin imports nothing for it.
    deployment = deployment_env.get_deployment()
    if deployment is not None and deployment.slots["attention"].plugin != SLOTS["attention"].default:
        from vllm_instant.patches.fused_rope_attention import serve

        if serve(model):
            announce_operator(model, vllm_config)
    return model


def announce_operator(model: Any, vllm_config: Any) -> None:
    """Add the operator to the configurations of a model's parts, before their graphs are compiled."""
    found = [vllm_config, *(getattr(module, "vllm_config", None) for module in model.modules())]
    for config in {id(config): config for config in found if config is not None}.values():
        splitting = config.compilation_config.splitting_ops
        if splitting and BESIDE in splitting and OPERATOR not in splitting:
            splitting.append(OPERATOR)
        if isinstance(config.additional_config, dict):
            config.additional_config = {**config.additional_config, CACHE_KEY: True}


_ATTENTION = "model_executor/layers/attention/attention.py"
_ROTARY = "model_executor/layers/rotary_embedding/base.py"
_BACKEND = "v1/attention/backend.py"

PATCH = VllmPatch(
    name="fused_rope",
    purpose="attention plugins that rotate and write in one launch",
    requirements=(
        HasSignature(
            "model_executor/model_loader/base_loader.py", "BaseModelLoader.load_model", ("self", "vllm_config")
        ),
        *(
            HasStatements(
                f"model_executor/models/{file}.py",
                f"{name}.forward",
                ("q, k = self.rotary_emb(positions, q, k)", "attn_output = self.attn(q, k, v)"),
            )
            for file, name in (("llama", "LlamaAttention"), ("qwen2", "Qwen2Attention"), ("qwen3", "Qwen3Attention"))
        ),
        HasSignature(_ATTENTION, "Attention.forward", ("self", "query", "key", "value"), exact=True),
        References(
            _ATTENTION,
            "Attention.forward",
            (
                "unified_kv_cache_update",
                "unified_attention_with_output",
                "_encode_layer_name",
                "kv_sharing_target_layer_name",
                "use_direct_call",
                "query_quant",
                "head_size_v",
                "layer_name",
            ),
        ),
        HasSignature(_ATTENTION, "get_attention_context", ("layer_name",), exact=True),
        HasSignature(
            _ATTENTION, "unified_attention_with_output", ("query", "key", "value", "output", "layer_name"), exact=True
        ),
        HasSignature(_ROTARY, "RotaryEmbeddingBase._match_cos_sin_cache_dtype", ("self", "query"), exact=True),
        References(_ROTARY, "RotaryEmbedding.forward_cuda", ("rotary_embedding", "use_flashinfer", "is_neox_style")),
        HasSignature(_ROTARY, "RotaryEmbedding.forward_native", ("self", "positions", "query", "key"), exact=True),
        HasSignature(
            "_custom_ops.py",
            "rotary_embedding",
            ("positions", "query", "key", "head_size", "cos_sin_cache", "is_neox"),
            exact=True,
        ),
        HasSignature(
            _BACKEND,
            "AttentionImpl.do_rope_and_kv_cache_update",
            (
                "self",
                "layer",
                "query",
                "key",
                "value",
                "positions",
                "cos_sin_cache",
                "is_neox",
                "kv_cache",
                "layer_slot_mapping",
            ),
            exact=True,
        ),
        HasSignature(_BACKEND, "AttentionImpl.fused_rope_kvcache_supported", ("self",), exact=True),
        HasAttribute("config/compilation.py", "CompilationConfig.splitting_ops"),
        HasAttribute("config/vllm.py", "VllmConfig.additional_config"),
    ),
    slots=("attention",),
    optional=True,
    wraps={f"{MODEL_LOADER}:BaseModelLoader.load_model": _load_model},
)
