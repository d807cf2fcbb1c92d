"""A larger model that computes the same function.

The demo's base model has a few million parameters; serving it would show a target that costs next to nothing. It is
widened with zeros and deepened with layers that add nothing to the residual stream, on the user's machine: the
distribution stays the same (up to float rounding), the cost becomes that of a model of over 100 million parameters.
So acceptance rates are those of a really trained pair, at a realistic ratio of target cost to draft cost.

Why it is the same function: the hidden state keeps the base's values in its first dimensions and zeros behind them.
Nothing writes to the zeros, because the added rows of every output projection are zero; added layers have output
projections of zero and leave the state as it is; RMSNorm divides by the mean square over all dimensions, which is
smaller by the ratio of widths, so its weights are multiplied by the square root of that ratio and its epsilon by the
ratio itself. Everything else in the new matrices is random, so that no kernel can profit from sparsity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Size:
    """Shape of the expanded model; every number must be at least the base's, head size and head ratio stay."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


MEDIUM = Size(hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=16)
"""About 105 million parameters with the demo vocabulary: what two cores serve at tens of tokens per second."""

SMALL = Size(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4)
"""Little more than the base itself, for tests."""


def expand(base: LlamaForCausalLM, size: Size, seed: int = 0) -> LlamaForCausalLM:
    """The expanded model in float32, on the CPU.

    Args:
        base: a Llama model with tied embeddings, float32.
        size: the shape to reach.
        seed: for the weights that have no influence.

    Raises:
        ValueError: when ``size`` is smaller than the base anywhere, or changes the ratio of heads to KV heads.

    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    old = base.config
    group = old.num_attention_heads // old.num_key_value_heads
    for name, value in vars(size).items():
        if value < getattr(old, name):
            raise ValueError(f"{name} = {value} is smaller than the base's {getattr(old, name)}")
    if size.num_attention_heads % group:
        raise ValueError(f"num_attention_heads must be a multiple of {group}, the base's heads per KV head")

    ratio = old.hidden_size / size.hidden_size
    config = LlamaConfig(
        **{
            **old.to_dict(),
            **vars(size),
            "num_key_value_heads": size.num_attention_heads // group,
            "rms_norm_eps": old.rms_norm_eps * ratio,
            "dtype": None,
        }
    )
    new = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.normal_(0, 0.02, generator=generator)
        widen(new.model.embed_tokens.weight, base.model.embed_tokens.weight, rows_free=False)
        scale_norm(new.model.norm.weight, base.model.norm.weight, ratio)
        for index, layer in enumerate(new.model.layers):
            if index >= old.num_hidden_layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
                layer.input_layernorm.weight.fill_(1)
                layer.post_attention_layernorm.weight.fill_(1)
                continue
            source = base.model.layers[index]
            scale_norm(layer.input_layernorm.weight, source.input_layernorm.weight, ratio)
            scale_norm(layer.post_attention_layernorm.weight, source.post_attention_layernorm.weight, ratio)
            for name in ("q_proj", "k_proj", "v_proj"):
                widen(getattr(layer.self_attn, name).weight, getattr(source.self_attn, name).weight, rows_free=True)
            for name in ("gate_proj", "up_proj"):
                widen(getattr(layer.mlp, name).weight, getattr(source.mlp, name).weight, rows_free=True)
            narrow_output(layer.self_attn.o_proj.weight, source.self_attn.o_proj.weight)
            narrow_output(layer.mlp.down_proj.weight, source.mlp.down_proj.weight)
    return new.eval()


def widen(new, old, rows_free: bool) -> None:  # type: ignore[no-untyped-def]
    """Copy into the top left, where old rows read old inputs only; added rows are random if ``rows_free``, or zero."""
    rows, columns = old.shape
    if not rows_free:
        new.zero_()
    new[:rows].zero_()
    new[:rows, :columns] = old


def narrow_output(new, old) -> None:  # type: ignore[no-untyped-def]
    """Copy into the top left; outputs beyond the old ones are zero, and added inputs are ignored."""
    rows, columns = old.shape
    new.zero_()
    new[:rows, :columns] = old


def scale_norm(new, old, ratio: float) -> None:  # type: ignore[no-untyped-def]
    """RMSNorm weights for a state that is wider by zeros; ``ratio`` is the old width to the new one."""
    new.fill_(1)
    new[: old.shape[0]] = old * math.sqrt(ratio)
