"""Replace the rotary embedding of a loaded model's attention modules; imported only with an attention plugin."""

from __future__ import annotations

import ast
import inspect
import logging
import re
import textwrap
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.attention.attention import Attention, get_attention_context
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.utils.torch_utils import _encode_layer_name

from vllm_instant.interfaces.attention import Rotation
from vllm_instant.patches.attention_backend import InstantAttentionImpl

logger = logging.getLogger("vllm.instant")

NAMESPACE = "vllm_instant"
SCHEMA = (
    "rotate_and_write(Tensor query, Tensor key, Tensor value, Tensor positions, Tensor cos_sin, bool is_neox, "
    "str layer_name) -> Tensor"
)


class Unrotated(NamedTuple):
    """An unrotated key and its rotation's arguments, passed from ``DeferredRotation`` to ``RotatingAttention``."""

    key: torch.Tensor
    positions: torch.Tensor
    cos_sin: torch.Tensor
    is_neox: bool


class DeferredRotation(torch.nn.Module):
    """Replaces a ``RotaryEmbedding``, which other layers may share; returns the query unrotated."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
        # Several positions per token (multimodal RoPE) are another rotation.
        if positions.dim() != 1:
            return self.rotary(positions, query, key)
        cos_sin = self.rotary._match_cos_sin_cache_dtype(query)
        return query, Unrotated(key, positions, cos_sin, self.rotary.is_neox_style)


class RotatingAttention(Attention):
    """An ``Attention`` that also takes unrotated keys."""

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(key, Unrotated):
            return super().forward(query, key, value, *args, **kwargs)
        # As vLLM's, with the writing operator replaced. No operation may separate the two: vLLM splits graphs there.
        key, positions, cos_sin, is_neox = key
        output = query.new_empty((query.shape[0], self.num_heads * self.head_size))
        rows = output.view(-1, self.num_heads, self.head_size)
        query = query.view(-1, self.num_heads, self.head_size)
        key = key.view(-1, self.num_kv_heads, self.head_size)
        value = value.view(-1, self.num_kv_heads, self.head_size)
        encoded = _encode_layer_name(self.layer_name)
        rotated = torch.ops.vllm_instant.rotate_and_write(
            query, key, value, positions, cos_sin, is_neox, self.layer_name
        )
        torch.ops.vllm.unified_attention_with_output(rotated, key, value, rows, encoded)
        return output


def _rotate_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    is_neox: bool,
    layer_name: str,
) -> torch.Tensor:
    """Return rotated queries in new memory, so that vLLM's kernels find unchanged inputs if the plugin raises."""
    _, layer, kv_cache, slots = get_attention_context(layer_name)
    # Without slots vLLM only profiles memory: there is nothing to write or attend to.
    if slots is None:
        return query.clone(memory_format=torch.contiguous_format)
    rotated = torch.empty_like(query, memory_format=torch.contiguous_format)
    rotation = Rotation(positions, cos_sin, is_neox)
    layer.impl.rotate_and_write(layer, query, key, value, rotated, rotation, kv_cache, slots)
    return rotated


def _shape_of_rotated(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@cache
def register_operator() -> Any:
    """Register ``vllm_instant::rotate_and_write``; keep the library object: the operator is removed with it."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(SCHEMA)
    for device in ("CPU", "CUDA"):
        library.impl("rotate_and_write", _rotate_and_write, device)
    library._register_fake("rotate_and_write", _shape_of_rotated)
    return library


@cache
def hands_on(forward: Any) -> bool:
    """Whether a module's ``forward`` passes rotated queries and keys to its attention and uses them nowhere else.

    ``q, k = self.rotary_emb(positions, q, k)`` and then ``… = self.attn(q, k, v)``, with any variable names, each once.
    """
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        return False
    text = [ast.unparse(statement) for statement in getattr(body, "body", ())]
    for number, statement in enumerate(text):
        rotating = re.fullmatch(r"(\w+), (\w+) = self\.rotary_emb\(\w+, \1, \2\)", statement)
        if rotating is None or number + 1 == len(text):
            continue
        query, key = rotating.groups()
        attending = rf"\w+ = self\.attn\({query}, {key}, (?!(?:{query}|{key})\b)\w+\)"
        others = "\n".join(text[:number] + text[number + 2 :])
        later = "\n".join(text[number + 2 :])
        return (
            re.fullmatch(attending, text[number + 1]) is not None
            and re.search(r"self\.(rotary_emb|attn)\(", others) is None
            and re.search(rf"\b({query}|{key})\b", later) is None
        )
    return False


def unsupported_reason(parent: Any, attention: Any) -> str | None:
    """Why vLLM rotates the queries and keys of a layer, as the end of a sentence; None if the plugin can."""
    rotary = getattr(parent, "rotary_emb", None)
    kind = type(rotary)
    if rotary is None or "forward" in vars(parent) or not hands_on(type(parent).forward):
        who = "the model" if parent is None else type(parent).__name__
        return f"{who} does not hand the result of its rotation straight to its attention"
    if type(attention) is not Attention:
        return f"their attention is a {type(attention).__name__}"
    if attention.kv_sharing_target_layer_name is not None:
        return "they read the cache of another layer"
    if attention.use_direct_call or attention.query_quant is not None:
        return "vLLM does not attend by an operator of unquantised queries here"
    plain = all(
        getattr(kind, name, None) is getattr(RotaryEmbedding, name) for name in ("forward_native", "forward_cuda")
    )
    if not plain or rotary.use_flashinfer:
        return f"{kind.__name__} does not rotate by one table of cosines and sines"
    if not rotary.head_size == attention.head_size == attention.head_size_v:
        return (
            f"rotation, keys and values disagree about the size of a head ({rotary.head_size}, {attention.head_size}, "
            f"{attention.head_size_v})"
        )
    found: str | None = attention.impl.plugin.instance.rotation_unsupported_reason(
        attention.head_size, rotary.rotary_dim, rotary.is_neox_style
    )
    return found


def serve(model: Any) -> int:
    """Let the attention plugin rotate in all layers that it supports; returns their number."""
    parents = {
        id(module.attn): module for module in model.modules() if isinstance(getattr(module, "attn", None), Attention)
    }
    layers = [
        module
        for module in model.modules()
        if isinstance(module, Attention)
        and isinstance(module.impl, InstantAttentionImpl)
        and not isinstance(module, RotatingAttention)
        and module.impl.plugin.instance.rotates()
    ]
    if not layers:
        return 0
    left: Counter[str] = Counter()
    for layer in layers:
        parent = parents.get(id(layer))
        reason = unsupported_reason(parent, layer)
        if reason is not None:
            left[reason] += 1
        elif parent is not None:
            register_operator()
            parent.rotary_emb = DeferredRotation(parent.rotary_emb)
            layer.__class__ = RotatingAttention
    name, served = layers[0].impl.plugin.plugin, len(layers) - sum(left.values())
    logger.info("Plugin %s of slot attention rotates in %d of %d layers", name, served, len(layers))
    for reason, number in left.items():
        logger.warning("Plugin %s of slot attention leaves the rotation in %d layers to vLLM: %s", name, number, reason)
    return served
