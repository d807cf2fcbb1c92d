"""A larger mixture of experts that computes the same function.

The same idea as for the dense demo model (``expand.py``): zero-padded width and experts with added neurons that
nothing listens to, everything without influence filled with random numbers. Experts then cost what experts cost: the
weights that a step has to read. The choice of experts and the distribution stay the same, up to float rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_instant.tools.demo.widen_model import narrow_output, scale_norm, widen

if TYPE_CHECKING:
    from transformers import MixtralForCausalLM


@dataclass(frozen=True)
class ExpertSize:
    """Shape of the expanded model; every number must be at least the model's own, heads and experts stay."""

    hidden_size: int
    expert_size: int


MEDIUM = ExpertSize(hidden_size=512, expert_size=384)
"""About 231 million parameters, 98 % of them in experts: two cores serve it at tens of steps per second."""

SMALL = ExpertSize(hidden_size=256, expert_size=32)
"""The demo's mixture of experts as it was trained, for tests."""


def expand_experts(base: MixtralForCausalLM, size: ExpertSize, seed: int = 0) -> MixtralForCausalLM:
    """The expanded model in float32, on the CPU, with an output matrix of its own.

    Args:
        base: a Mixtral model with tied embeddings, float32.
        size: the shape to reach.
        seed: for the weights that have no influence.

    Raises:
        ValueError: when ``size`` is smaller than the model anywhere.

    """
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    old = base.config
    for name, value, least in (
        ("hidden_size", size.hidden_size, old.hidden_size),
        ("expert_size", size.expert_size, old.intermediate_size),
    ):
        if value < least:
            raise ValueError(f"{name} = {value} is smaller than the model's {least}")
    ratio = old.hidden_size / size.hidden_size
    config = MixtralConfig(
        **{
            **old.to_dict(),
            "hidden_size": size.hidden_size,
            "intermediate_size": size.expert_size,
            "rms_norm_eps": old.rms_norm_eps * ratio,
            # vLLM's Mixtral reads an output matrix from the file.
            "tie_word_embeddings": False,
            "dtype": None,
        }
    )
    new = MixtralForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.normal_(0, 0.02, generator=generator)
        widen(new.model.embed_tokens.weight, base.model.embed_tokens.weight, rows_free=False)
        widen(new.lm_head.weight, base.model.embed_tokens.weight, rows_free=False)
        scale_norm(new.model.norm.weight, base.model.norm.weight, ratio)
        for layer, source in zip(new.model.layers, base.model.layers, strict=True):
            scale_norm(layer.input_layernorm.weight, source.input_layernorm.weight, ratio)
            scale_norm(layer.post_attention_layernorm.weight, source.post_attention_layernorm.weight, ratio)
            for name in ("q_proj", "k_proj", "v_proj"):
                widen(getattr(layer.self_attn, name).weight, getattr(source.self_attn, name).weight, rows_free=False)
            narrow_output(layer.self_attn.o_proj.weight, source.self_attn.o_proj.weight)
            widen(layer.mlp.gate.weight, source.mlp.gate.weight, rows_free=False)
            for expert in range(old.num_local_experts):
                into, of = layer.mlp.experts.gate_up_proj[expert], source.mlp.experts.gate_up_proj[expert]
                for half in range(2):
                    widen(into.chunk(2)[half], of.chunk(2)[half], rows_free=True)
                narrow_output(layer.mlp.experts.down_proj[expert], source.mlp.experts.down_proj[expert])
    return new.eval()
