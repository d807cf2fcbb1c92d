"""Which decoder layers of a model have a second half that plugins may compute, and where its weights are.

A layer qualifies if all of its parts are of kinds that are known to the letter (``KINDS``, which the patch's
requirements check in vLLM's sources). What derives from them without another ``forward`` does, too.
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
    """A layer that stays vLLM's; the message says why."""


def requirements() -> tuple[Requirement, ...]:
    """That vLLM's classes are still what ``KINDS`` says."""
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
    """The linear layers of its second half, by name; none where it has others."""
    found = [
        ("o_proj", getattr(layer.self_attn, "o_proj", None)),
        ("gate_up_proj", getattr(layer.mlp, "gate_up_proj", None)),
        ("down_proj", getattr(layer.mlp, "down_proj", None)),
    ]
    return found if all(linear is not None for _, linear in found) else []


def second_half(layer: Any, dtype: Any, device: str) -> FeedForwardLayer:
    """What a plugin needs to know of a layer's second half.

    Args:
        layer: one of ``candidates``, with weights as they are computed with.
        dtype: of the model's activations.
        device: where the weights must be: ``cuda``, ``cpu``, …

    Raises:
        UnservedLayerError: the layer is another than plugins compute.

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
    """The class whose ``forward`` a module has, patches of ours aside, as module and name."""
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
        # vLLM keeps such weights with their inputs first, and the inputs of one output side by side.
        weight, scales = weight.t(), scales.view(-1)
    elif weight is not None and weight.dtype != dtype:
        raise UnservedLayerError(f"{name} has weights of type {weight.dtype}, and the model computes in {dtype}")
    if weight is None or tuple(weight.shape) != shape or not weight.is_contiguous():
        found = None if weight is None else tuple(weight.shape)
        raise UnservedLayerError(f"vLLM keeps the weights of {name} in a form of its own (shape {found}, not {shape})")
    if weight.device.type != device:
        raise UnservedLayerError(f"the weights of {name} are on {weight.device.type}, and not on {device}")
    return LinearWeights(weight, scales)
