"""Attention plugins: which layers they serve, and the reason where they cannot.

A plugin is called through ``attention_backend``, registered under the name that vLLM reserves for third-party backends.
A method of vLLM's platform decides which backend serves a layer, and it is wrapped: a layer that the plugin does not
support gets the backend that vLLM would choose for the same type of cache, with a warning that says why. The CPU
platform knows only one backend; the wrapper lets it accept this one.

The CPU platform of vLLM up to 0.32 does not check the type of the KV cache: a type that its kernels do not know gives
wrong tokens. Here such a server does not start.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.deployment.errors import DeploymentError, Problem
from vllm_instant.deployment.resolved import ATTENTION_ARGUMENTS
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.interfaces.attention import AttentionProvider
from vllm_instant.interfaces.deployment import Deployment
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.plugin_factory import build_guarded, context_of
from vllm_instant.patches.wrapping import wrap_method

logger = logging.getLogger("vllm.instant")

REGISTRY_MODULE = "vllm.v1.attention.backends.registry"
SELECTOR_MODULE = "vllm.v1.attention.selector"
BACKEND = "vllm_instant.patches.attention_backend.InstantAttentionBackend"
PLACE = "CUSTOM"
"""The name that vLLM's registry reserves for a third party's backend."""

_UNSERVED = {
    "use_mla": "multi-head latent attention",
    "has_sink": "attention sinks",
    "use_sparse": "sparse attention",
    "use_mm_prefix": "prefixes that attend in both directions",
    "use_per_head_quant_scales": "scales per head",
    "use_non_causal": "attention that is not causal",
    "use_batch_invariant": "batch invariance",
    "use_pcp": "prefill context parallelism",
    "use_dcp": "decode context parallelism",
    "use_rswa": "windows that keep the prompt",
}
"""Features of a layer that the interface of attention plugins does not cover, by vLLM's name."""


def provider() -> GuardedPlugin[AttentionProvider] | None:
    """The deployment's attention plugin behind its breaker, built once per process and deployment; None without one.

    Raises:
        PluginStartError: the plugin cannot start here.

    """
    deployment = deployment_env.get_deployment()
    return None if deployment is None else _built(deployment.model_dump_json())


@cache
def _built(text: str) -> GuardedPlugin[AttentionProvider] | None:
    from vllm.config import get_current_vllm_config

    deployment = Deployment.model_validate_json(text)
    return build_guarded("attention", deployment, context_of(get_current_vllm_config(), deployment))


def unsupported_reason(plugin: AttentionProvider, asked: Any) -> str | None:
    """Why a plugin cannot serve layers as vLLM's ``AttentionSelectorConfig`` describes them; None if it can."""
    found = [words for name, words in _UNSERVED.items() if getattr(asked, name, False)]
    if found:
        return f"attention plugins do not know {' and '.join(found)}"
    if asked.attn_type != "decoder":
        return f"attention plugins serve decoders, and this layer is of type {asked.attn_type}"
    if asked.kv_cache_dtype != ATTENTION_ARGUMENTS["kv_cache_dtype"]:
        wanted = ATTENTION_ARGUMENTS["kv_cache_dtype"]
        return f"the KV cache is of type {asked.kv_cache_dtype}, and attention plugins need {wanted}"
    return plugin.unsupported_reason(asked.head_size, asked.dtype)


def unsupported_cache_reason(kv_cache_dtype: str | None, backend: Any) -> str | None:
    """What is wrong with a type of KV cache on a CPU; None if nothing is.

    Args:
        kv_cache_dtype: of vLLM's ``--kv-cache-dtype``.
        backend: the attention backend that was asked for: an enum member, its name, or None.

    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    known = CPUAttentionBackend.supported_kv_cache_dtypes
    # 16-bit types are those of models; vLLM itself resolves and checks them.
    if kv_cache_dtype in (None, *known, "bfloat16", "float16") or _name(backend) == PLACE:
        return None
    return (
        f"vLLM's attention on CPUs cannot read a KV cache of type {kv_cache_dtype} and would give wrong tokens; "
        f"valid: {', '.join(known)}"
    )


def _name(backend: Any) -> str:
    return str(getattr(backend, "name", backend)).upper()


def refuse_unreadable_cache(arguments: Any) -> None:
    """Raise DeploymentError where parsed options (or EngineArgs) ask a CPU for a cache that it cannot read."""
    from vllm.platforms import current_platform

    asked = getattr(arguments, "kv_cache_dtype", None)
    if asked in (None, "auto") or not current_platform.is_cpu():
        return
    message = unsupported_cache_reason(asked, getattr(arguments, "attention_backend", None))
    if message is not None:
        raise DeploymentError([Problem("--kv-cache-dtype", "", message)])


def _wrap_platform(module: Any) -> None:
    """Wrap the current platform's choice of a backend, once the module that asks for it is loaded."""
    from vllm.platforms import current_platform

    wrap_method(type(current_platform), "get_attn_backend_cls", _get_attn_backend_cls)


def _get_attn_backend_cls(original: Any, platform: Any, *args: Any, **kwargs: Any) -> str:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return _choose(original, getattr(AttentionBackendEnum, PLACE), current_platform.is_cpu(), *args, **kwargs)


def _choose(
    original: Any, place: Any, on_cpu: bool, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
) -> str:
    """The class of the attention backend of one kind of layer: the plugin's, or the one that vLLM chooses."""
    plugin = provider() if selected_backend == place else None
    if plugin is not None:
        reason = unsupported_reason(plugin.instance, attn_selector_config)
        if reason is None:
            return BACKEND
        logger.warning("Plugin %s of slot attention leaves layers to vLLM: %s", plugin.plugin, reason)
        selected_backend = None
    if on_cpu:
        message = unsupported_cache_reason(attn_selector_config.kv_cache_dtype, selected_backend)
        if message is not None:
            raise ValueError(message)
    return str(original(selected_backend, attn_selector_config, *args, **kwargs))


def _register(module: Any) -> None:
    """Name the backend in vLLM's registry, which other callers than the wrapped choice read, too."""
    deployment = deployment_env.get_deployment()
    # From the name alone: a worker must not load plugins this early (see activation.activate).
    if deployment is not None and deployment.slots["attention"].plugin != SLOTS["attention"].default:
        module.register_backend(getattr(module.AttentionBackendEnum, PLACE), BACKEND)


_BACKEND = "v1/attention/backend.py"
_TRITON = "v1/attention/backends/triton_attn.py"
_CHOICE = ("cls", "selected_backend", "attn_selector_config", "num_heads")

PATCH = VllmPatch(
    name="attention",
    purpose="attention plugins and the KV cache that they lay out",
    requirements=(
        HasSignature("v1/attention/backends/registry.py", "register_backend", ("backend", "class_path"), exact=True),
        HasAttribute("v1/attention/backends/registry.py", "AttentionBackendEnum.CUSTOM"),
        References(
            "v1/attention/selector.py", "_cached_get_attn_backend", ("get_attn_backend_cls", "current_platform")
        ),
        *(HasAttribute("v1/attention/selector.py", f"AttentionSelectorConfig.{name}") for name in _UNSERVED),
        *(
            HasAttribute("v1/attention/selector.py", f"AttentionSelectorConfig.{name}")
            for name in ("head_size", "dtype", "kv_cache_dtype", "attn_type")
        ),
        HasSignature("platforms/cuda.py", "CudaPlatformBase.get_attn_backend_cls", _CHOICE, exact=True),
        HasSignature("platforms/cpu.py", "CpuPlatform.get_attn_backend_cls", _CHOICE, exact=True),
        HasAttribute("v1/attention/backends/cpu_attn.py", "CPUAttentionBackend.supported_kv_cache_dtypes"),
        HasSignature(_BACKEND, "AttentionBackend.customize_spec", ("cls", "spec"), exact=True),
        References(_TRITON, "TritonAttentionBackend.customize_spec", ("state_content_bytes", "is_per_token_head")),
        HasAttribute("v1/kv_cache_interface.py", "AttentionSpec.state_content_bytes"),
        References("v1/worker/utils.py", "customize_attention_spec", ("customize_spec",)),
        HasAttribute("config/speculative.py", "SpeculativeConfig.attention_backend"),
        HasSignature(_TRITON, "TritonAttentionImpl._pth_key_value_caches", ("self", "kv_cache"), exact=True),
        References(
            _TRITON,
            "TritonAttentionImpl.forward",
            ("_pth_key_value_caches", "_k_scale_cache", "_v_scale_cache", "num_actual_tokens"),
        ),
        HasSignature(
            _TRITON,
            "TritonAttentionImpl.forward",
            (
                "self",
                "layer",
                "query",
                "key",
                "value",
                "kv_cache",
                "attn_metadata",
                "output",
                "output_scale",
                "output_block_scale",
            ),
            exact=True,
        ),
        HasSignature(
            _TRITON,
            "TritonAttentionImpl.do_kv_cache_update",
            ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
            exact=True,
        ),
        References(
            _TRITON,
            "TritonAttentionImpl.__init__",
            (
                "alibi_slopes",
                "sliding_window",
                "logits_soft_cap",
                "attn_type",
                "sinks",
                "num_kv_heads",
                "chunk_lookback",
            ),
        ),
        *(
            HasAttribute(_TRITON, f"TritonAttentionMetadata.{name}")
            for name in (
                "block_table",
                "causal",
                "max_query_len",
                "mm_prefix_range_tensor",
                "query_start_loc",
                "rswa_prefix_lens",
                "seq_lens",
            )
        ),
    ),
    slots=("attention",),
    on_import={REGISTRY_MODULE: _register, SELECTOR_MODULE: _wrap_platform},
)
