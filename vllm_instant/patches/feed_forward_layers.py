"""The decoder layers of a model whose second half a plugin can compute, and the weights of that half.

A layer qualifies if the ``forward`` of each of its parts is listed in ``KINDS`` word for word; the patch's requirements
compare the list with vLLM's sources. Subclasses qualify, too, unless they override ``forward``.
"""

from __future__ import annotations

import ast
from typing import Any

from vllm_instant.interfaces.feed_forward import FeedForwardLayer, LinearWeights
from vllm_instant.patches.compat import HasStatements, Requirement

MODELS = "vllm.model_executor.models"
_HALF = """
hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
hidden_states = self.mlp(hidden_states)
return hidden_states, residual
"""
_CONDITIONED = """
hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
if self.ada_rms_norm_t_cond is not None:
    assert t_cond is not None
    hidden_states = hidden_states * (1 + self.ada_rms_norm_t_cond(t_cond))
hidden_states = self.mlp(hidden_states)
return hidden_states, residual
"""
_ATTENTION = """
attn_output = self.attn(q, k, v)
output, _ = self.o_proj(attn_output)
return output
"""
_MLP = """
x, _ = self.gate_up_proj(x)
x = self.act_fn(x)
x, _ = self.down_proj(x)
return x
"""

KINDS: dict[str, dict[str, str]] = {
    "layer": {
        "llama.LlamaDecoderLayer": _HALF,
        "llama_eagle3.LlamaDecoderLayer": _HALF,
        "mistral.MistralDecoderLayer": _CONDITIONED,
        "qwen2.Qwen2DecoderLayer": _HALF,
        "qwen3.Qwen3DecoderLayer": _HALF,
        "qwen3_eagle3.Qwen3Eagle3DecoderLayer": _HALF,
    },
    "attention": {
        "llama.LlamaAttention": _ATTENTION,
        "mistral.MistralAttention": _ATTENTION,
        "qwen2.Qwen2Attention": _ATTENTION,
        "qwen3.Qwen3Attention": _ATTENTION,
    },
    "feed-forward": {
        "llama.LlamaMLP": _MLP.replace("self.act_fn(x)", "maybe_fused_act_quant(self.act_fn, x, self.down_proj)"),
        "mistral.MistralMLP": _MLP,
        "qwen2.Qwen2MLP": _MLP.replace("x, _ = self.gate_up", "gate_up, _ = self.gate_up").replace(
            "act_fn(x)", "act_fn(gate_up)"
        ),
    },
}
"""How the ``forward`` of each known class ends, by the part of a layer that it is."""

NORM = "vllm.model_executor.layers.layernorm.RMSNorm"
ACTIVATION = "vllm.model_executor.layers.activation.SiluAndMul"


class UnservedLayerError(Exception):
    """A layer that a plugin cannot compute; the message says why."""


def requirements() -> tuple[Requirement, ...]:
    """The requirements that vLLM's classes still have the statements of ``KINDS``."""
    return tuple(
        HasStatements(
            f"model_executor/models/{module}.py", f"{name}.forward", tuple(map(ast.unparse, ast.parse(code).body))
        )
        for of_part in KINDS.values()
        for (module, name), code in ((known.split("."), code) for known, code in of_part.items())
    )


def candidates(model: Any) -> list[Any]:
    """The modules of a model that look like decoder layers."""
    parts = ("self_attn", "mlp", "post_attention_layernorm")
    return [module for module in model.modules() if all(hasattr(module, part) for part in parts)]


def linears(layer: Any) -> list[tuple[str, Any]]:
    """The linear layers of the layer's second half with their names; an empty list if one is missing."""
    found = [
        ("o_proj", getattr(layer.self_attn, "o_proj", None)),
        ("gate_up_proj", getattr(layer.mlp, "gate_up_proj", None)),
        ("down_proj", getattr(layer.mlp, "down_proj", None)),
    ]
    return found if all(linear is not None for _, linear in found) else []


def second_half(layer: Any, dtype: Any, device: str) -> FeedForwardLayer:
    """Describe a layer's second half for a plugin.

    Args:
        layer: one of ``candidates``, with weights as they are computed with.
        dtype: of the model's activations.
        device: where the weights must be: ``cuda``, ``cpu``, …

    Raises:
        UnservedLayerError: plugins cannot compute this layer.

    """
    for part, module in (("layer", layer), ("attention", layer.self_attn), ("feed-forward", layer.mlp)):
        if _written_in(module) not in {f"{MODELS}.{known}" for known in KINDS[part]}:
            raise UnservedLayerError(f"its {part} is of a kind that is not known ({type(module).__name__})")
    norm, activation = layer.post_attention_layernorm, layer.mlp.act_fn
    for module, wanted in ((norm, NORM), (activation, ACTIVATION)):
        if _class_of(module) != wanted:
            raise UnservedLayerError(f"it has a {type(module).__name__} and not vLLM's {wanted.rpartition('.')[2]}")
    if getattr(layer, "ada_rms_norm_t_cond", None) is not None:
        raise UnservedLayerError("its norm is conditioned on another input")
    if norm.variance_size_override is not None or not norm.has_weight:
        raise UnservedLayerError("its norm is over a part of the hidden state, or has no weights")
    for module in (layer, layer.self_attn, layer.mlp, norm, *(linear for _, linear in linears(layer))):
        if "forward" in vars(module):
            raise UnservedLayerError("its weights are moved to the device for each step (offloading)")
    output, both, down = (_weights(name, linear, dtype, device) for name, linear in linears(layer))
    return FeedForwardLayer(output, norm.weight, norm.variance_epsilon, both, down, dtype)


def _written_in(module: Any) -> str:
    """The class that defines a module's ``forward``, as module and name; subclasses of this package are skipped."""
    for kind in type(module).__mro__:
        if "forward" in vars(kind) and not kind.__module__.startswith("vllm_instant"):
            return f"{kind.__module__}.{kind.__qualname__}"
    return ""


def _class_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _weights(name: str, linear: Any, dtype: Any, device: str) -> LinearWeights:
    import torch
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    if linear.tp_size > 1:
        raise UnservedLayerError(f"{name} is split between {linear.tp_size} workers (tensor parallelism)")
    if getattr(linear, "bias", None) is not None:
        raise UnservedLayerError(f"{name} has a bias")
    if not linear.return_bias:
        raise UnservedLayerError(f"{name} does not return its bias")
    weight, shape = getattr(linear, "weight", None), (linear.output_size, linear.input_size)
    method = linear.quant_method
    scales: Any = None
    if weight is not None and not isinstance(method, UnquantizedLinearMethod):
        scales = getattr(linear, "weight_scale", None)
        is_known = (
            weight.dtype == torch.float8_e4m3fn
            and getattr(linear, "weight_block_size", None) is None
            and scales is not None
            and scales.dtype == torch.float32
            and scales.numel() == linear.output_size
        )
        if not is_known:
            raise UnservedLayerError(
                f"{name} is quantised ({type(method).__name__}, weights of type {weight.dtype}), and plugins know FP8 "
                "weights with one scale an output"
            )
        # vLLM stores such weights transposed, as [inputs, outputs] with the inputs of one output contiguous.
        weight, scales = weight.t(), scales.view(-1)
    elif weight is not None and weight.dtype != dtype:
        raise UnservedLayerError(f"{name} has weights of type {weight.dtype}, and the model computes in {dtype}")
    if weight is None or tuple(weight.shape) != shape or not weight.is_contiguous():
        found = None if weight is None else tuple(weight.shape)
        raise UnservedLayerError(f"vLLM keeps the weights of {name} in a form of its own (shape {found}, not {shape})")
    if weight.device.type != device:
        raise UnservedLayerError(f"the weights of {name} are on {weight.device.type}, and not on {device}")
    return LinearWeights(weight, scales)
