"""Compute the second half of decoder layers by one operator of an attention plugin.

A layer's ``forward`` stays as it is; its parts change: the output projection returns the attention's output unchanged,
the norm after it becomes the operator that computes the whole half, and the feed-forward returns its input. So
vLLM's convention stays: a layer returns the feed-forward's result and the residual stream before it, and the next
norm adds the two. Each part's class becomes a subclass of itself, so that type checks and the names of weights still
work.

torch.compile and CUDA graphs see the operator as one opaque node. It calls the plugin for batches of up to
``max_rows``; for larger ones, and once the plugin is disabled, it runs vLLM's own parts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from vllm_instant.deployment import deployment_env
from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.deployment.slots import SLOTS
from vllm_instant.interfaces.feed_forward import FeedForwardProvider
from vllm_instant.patches import attention
from vllm_instant.patches.compat import HasAttribute, HasSignature, References, VllmPatch
from vllm_instant.patches.feed_forward_layers import (
    UnservedLayerError,
    candidates,
    linears,
    requirements,
    second_half,
)
from vllm_instant.patches.names import MODEL_LOADER
from vllm_instant.patches.plugin_factory import PluginStartError
from vllm_instant.patches.wrapping import wrap_method

logger = logging.getLogger("vllm.instant")

SERVED = "instant_feed_forward"
"""On an attention layer: the ``ServedHalf`` behind it. On a norm: that layer's name."""
CACHE_KEY = "vllm_instant_feed_forward"
"""In ``additional_config``: separates compiled graphs with this package's operator from vLLM's in its compile cache."""


def provider(vllm_config: Any) -> GuardedPlugin[FeedForwardProvider] | None:
    """The attention plugin's provider of feed-forward kernels, behind its own circuit breaker; None without one.

    Raises:
        PluginStartError: the plugin cannot start here.

    """
    deployment = deployment_env.get_deployment()
    if deployment is None:
        return None
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(vllm_config):
        return _part(deployment.model_dump_json())


@cache
def _part(text: str) -> GuardedPlugin[FeedForwardProvider] | None:
    whole = attention.provider()
    part = None if whole is None else whole.instance.feed_forward()
    if whole is None or part is None:
        return None
    if not isinstance(part, FeedForwardProvider):
        raise PluginStartError(
            f"plugin {whole.plugin} of slot attention cannot start: its feed_forward() returned a "
            f"{type(part).__name__}; return None, or derive it from vllm_instant.FeedForwardProvider"
        )
    # Its kernels compile when a new shape comes.
    return GuardedPlugin("attention", f"{whole.plugin}.feed_forward", part, is_timed=False)


def unsupported_reason(vllm_config: Any) -> str | None:
    """Why the plugin can serve no layer of an engine, in one sentence; None if it may serve some."""
    from vllm import envs

    if vllm_config.lora_config is not None:
        return "LoRA adapters change its linear layers"
    if envs.VLLM_BATCH_INVARIANT:
        return "batches of different sizes would be computed in different ways (VLLM_BATCH_INVARIANT)"
    return None


class ServedHalf:
    """The second half of one layer, computed by the plugin or by vLLM's own parts.

    Args:
        plugin: the provider behind its circuit breaker.
        compute: the plugin's function for this layer.
        layer: vLLM's decoder layer, whose parts are changed here.

    """

    def __init__(
        self, plugin: GuardedPlugin[FeedForwardProvider], compute: Callable[[Any, Any], Any], layer: Any
    ) -> None:
        self._plugin = plugin
        self._compute = compute
        projection, norm, mlp = layer.self_attn.o_proj, layer.post_attention_layernorm, layer.mlp
        self._parts = [(part, type(part).forward) for part in (projection, norm, mlp)]
        attending = layer.self_attn.attn
        setattr(attending, SERVED, self)
        setattr(norm, SERVED, attending.layer_name)
        for part, make in ((projection, _passing_on), (norm, _computing), (mlp, _passing)):
            kind: Any = type(part)
            part.__class__ = make(kind)

    def __call__(self, attended: Any, residual: Any) -> tuple[Any, Any]:
        """The feed-forward's result and the residual stream before it, from the attention's output and residual."""
        if 0 < len(attended) <= self._plugin.instance.max_rows:
            attended, residual = attended.contiguous(), residual.contiguous()
            computed = self._plugin.call("compute", lambda _: self._by_plugin(attended, residual), None)
            if computed is not None:
                return computed
        return self._separately(attended, residual)

    def _by_plugin(self, attended: Any, residual: Any) -> tuple[Any, Any]:
        added, before = self._compute(attended, residual)
        for found in (added, before):
            if found.shape != residual.shape or found.dtype != residual.dtype:
                raise ContractError(
                    f"it returned {found.dtype} of shape {tuple(found.shape)} for a residual stream of "
                    f"{residual.dtype} and shape {tuple(residual.shape)}"
                )
        return added, before

    def _separately(self, attended: Any, residual: Any) -> tuple[Any, Any]:
        (projection, project), (norm, normalise), (mlp, feed) = self._parts
        projected, _ = project(projection, attended)
        with _fastest_norm():
            # The norm adds in place, and an operator must leave its inputs alone.
            normed, residual = normalise(norm, projected, residual.clone())
        return feed(mlp, normed), residual


def _fastest_norm() -> Any:
    """The norm by a kernel. Where vLLM compiles graphs it prefers plain tensor operations, which are slow eagerly."""
    from vllm import ir

    norm = ir.ops.fused_add_rms_norm
    known = norm.supported_providers()
    return norm.set_priority([name for name in ("vllm_c", "native") if name in known])


@lru_cache(maxsize=16)
def _passing_on(base: Any) -> Any:
    def forward(self: Any, input_: Any) -> Any:
        return input_, None

    return type(f"Instant{base.__name__}", (base,), {"__module__": __name__, "forward": forward})


@lru_cache(maxsize=16)
def _passing(base: Any) -> Any:
    def forward(self: Any, x: Any) -> Any:
        return x

    return type(f"Instant{base.__name__}", (base,), {"__module__": __name__, "forward": forward})


@lru_cache(maxsize=16)
def _computing(base: Any) -> Any:
    import torch
    from vllm.utils.torch_utils import _encode_layer_name

    register_operator()

    def forward(self: Any, x: Any, residual: Any = None) -> Any:
        return torch.ops.vllm_instant.feed_forward(x, residual, _encode_layer_name(self.instant_feed_forward))

    return type(f"Instant{base.__name__}", (base,), {"__module__": __name__, "forward": forward})


def _feed_forward(attended: Any, residual: Any, layer_name: Any) -> Any:
    from vllm.forward_context import get_forward_context
    from vllm.utils.torch_utils import _resolve_layer_name

    layer = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    return getattr(layer, SERVED)(attended, residual)


def _shape(attended: Any, residual: Any, layer_name: Any) -> tuple[Any, Any]:
    import torch

    return torch.empty_like(residual), torch.empty_like(residual)


@lru_cache(maxsize=1)
def register_operator() -> Any:
    """Register ``vllm_instant::feed_forward``; keep the library object: the operator is removed with it.

    Layers are named by vLLM's ``LayerName``, an input of the graph, so that graphs that differ in the layer alone are
    compiled once.
    """
    import torch
    from vllm.utils.torch_utils import LayerNameType, direct_register_custom_op

    tensors = dict.fromkeys(("attended", "residual"), torch.Tensor)
    for function in (_feed_forward, _shape):
        function.__annotations__ = {
            **tensors,
            "layer_name": LayerNameType,
            "return": tuple[torch.Tensor, torch.Tensor],
        }
    library = torch.library.Library("vllm_instant", "FRAGMENT")
    direct_register_custom_op("feed_forward", _feed_forward, fake_impl=_shape, target_lib=library)
    return library


def attach(model: Any, vllm_config: Any, model_config: Any, plugin: GuardedPlugin[FeedForwardProvider]) -> int:
    """Serve the supported layers of a loaded model; returns their number. Logs once why others are not."""
    device = str(vllm_config.device_config.device_type)
    found = candidates(model)
    # A loader may call another loader's method, which has served the layers already.
    layers = [layer for layer in found if not hasattr(layer.post_attention_layernorm, SERVED)]
    reasons: Counter[str] = Counter()
    for layer in layers:
        try:
            half = second_half(layer, model_config.dtype, device)
            unsupported_reason = plugin.instance.unsupported_reason(half)
            if unsupported_reason is not None:
                raise UnservedLayerError(unsupported_reason)
        except UnservedLayerError as error:
            reasons[str(error)] += 1
            continue
        ServedHalf(plugin, plugin.instance.serve(half), layer)
    served = len(layers) - sum(reasons.values())
    for reason, number in reasons.items():
        logger.warning(
            "Plugin %s leaves %d layers of %s to vLLM: %s", plugin.plugin, number, model_config.model, reason
        )
    if not found:
        logger.warning("Plugin %s finds no decoder layer that it knows in %s", plugin.plugin, model_config.model)
    if served:
        logger.info(
            "Plugin %s computes %d layers of %s in batches of up to %d tokens",
            plugin.plugin,
            served,
            model_config.model,
            plugin.instance.max_rows,
        )
    return served


def _load_model(load: Any, loader: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
    plugin = provider(vllm_config) if is_chosen() else None
    reason = None if plugin is None else unsupported_reason(vllm_config)
    if plugin is None or reason is not None:
        if plugin is not None:
            logger.warning("Plugin %s leaves all layers to vLLM: %s", plugin.plugin, reason)
        return load(vllm_config, model_config, *args, **kwargs)
    # Before the model is built, because its parts keep copies of the configuration.
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config = {**vllm_config.additional_config, CACHE_KEY: plugin.plugin}
    model = load(vllm_config, model_config, *args, **kwargs)
    attach(model, vllm_config, model_config, plugin)
    return model


def _create_model(create: Any, loader: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    model = create(vllm_config, *args, **kwargs)
    if str(vllm_config.device_config.device_type) == "cpu" and is_chosen() and provider(vllm_config) is not None:
        # vLLM packs weights for its CPU kernels and discards the layout that a plugin reads.
        for layer in candidates(model):
            for _, linear in linears(layer):
                linear._cpu_skip_gemm_dispatch = True
    return model


def _wrap_other_loaders(module: Any) -> None:
    """Wrap ``load_model`` of the loaders that override the base class's."""
    for loader in set(module._LOAD_FORMAT_TO_MODEL_LOADER.values()) - {module.BaseModelLoader}:
        if "load_model" in vars(loader):
            wrap_method(loader, "load_model", _load_model)


def is_chosen() -> bool:
    """Whether the deployment names an attention plugin; from its name alone, see ``activation.activate``."""
    deployment = deployment_env.get_deployment()
    return deployment is not None and deployment.slots["attention"].plugin != SLOTS["attention"].default


_LOADER = "model_executor/model_loader"
_LAYERS = "model_executor/layers"

PATCH = VllmPatch(
    name="feed_forward",
    purpose="attention plugins that compute the second half of decoder layers in small batches",
    requirements=(
        *requirements(),
        HasAttribute(f"{_LOADER}/__init__.py", "_LOAD_FORMAT_TO_MODEL_LOADER"),
        HasSignature(f"{_LOADER}/base_loader.py", "BaseModelLoader.create_model", ("self", "vllm_config")),
        HasSignature(
            f"{_LOADER}/base_loader.py", "BaseModelLoader.load_model", ("self", "vllm_config", "model_config")
        ),
        References(
            f"{_LOADER}/base_loader.py",
            "BaseModelLoader.load_model",
            ("create_model", "process_weights_after_loading"),
        ),
        HasSignature(f"{_LAYERS}/layernorm.py", "RMSNorm.forward_native", ("self", "x", "residual"), exact=True),
        References(f"{_LAYERS}/layernorm.py", "RMSNorm.forward_native", ("fused_add_rms_norm", "maybe_inplace")),
        References(
            f"{_LAYERS}/layernorm.py",
            "RMSNorm.__init__",
            ("variance_epsilon", "variance_size_override", "has_weight", "weight"),
        ),
        HasAttribute(f"{_LAYERS}/activation.py", "SiluAndMul"),
        HasSignature("ir/op.py", "IrOp.set_priority", ("self", "priority"), exact=True),
        HasSignature("ir/op.py", "IrOp.supported_providers", ("self",), exact=True),
        HasSignature(f"{_LAYERS}/linear.py", "RowParallelLinear.forward", ("self", "input_"), exact=True),
        References(
            f"{_LAYERS}/linear.py", "LinearBase.__init__", ("tp_size", "return_bias", "input_size", "output_size")
        ),
        References(f"{_LAYERS}/linear.py", "UnquantizedLinearMethod.process_weights_after_loading", ("cpu_linear",)),
        HasAttribute("forward_context.py", "ForwardContext.no_compile_layers"),
        References(f"{_LAYERS}/attention/attention.py", "Attention.__init__", ("layer_name", "static_forward_context")),
        HasAttribute("utils/torch_utils.py", "LayerName"),
        HasSignature("utils/torch_utils.py", "_encode_layer_name", ("layer_name",), exact=True),
        HasSignature("utils/torch_utils.py", "_resolve_layer_name", ("layer_name",), exact=True),
        HasSignature("utils/torch_utils.py", "direct_register_custom_op", ("op_name", "op_func", "mutates_args")),
        HasAttribute("config/vllm.py", "VllmConfig.additional_config"),
        HasAttribute("config/vllm.py", "VllmConfig.lora_config"),
    ),
    slots=("attention",),
    optional=True,
    wraps={
        f"{MODEL_LOADER}:BaseModelLoader.create_model": _create_model,
        f"{MODEL_LOADER}:BaseModelLoader.load_model": _load_model,
    },
    on_import={MODEL_LOADER: _wrap_other_loaders},
    is_wanted=is_chosen,
)
