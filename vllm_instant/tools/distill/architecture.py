"""The shape of a draft model, derived from its target: the same vocabulary, a fraction of the parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig

LARGEST_SHARE = 0.1
"""Parameters of the draft relative to the target's: at least 90 % fewer."""
LAYERS_OF_TARGET = 3
MAX_LAYERS = 4
"""A draft token costs one pass through all layers, one after the other: width is cheaper than depth."""
WIDTH_STEP = 32


def parameters(config: LlamaConfig) -> int:
    """How many parameters a model with this configuration has (nothing is allocated)."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return int(LlamaForCausalLM(config).num_parameters())


def shaped(target: Any, layers: int, width: int) -> LlamaConfig:
    """A Llama configuration of this depth and width that reads and writes the target's tokens.

    Args:
        target: the target's Hugging Face text configuration.
        layers: how many layers.
        width: hidden size, a multiple of 32.

    """
    from transformers import LlamaConfig

    head_dim = 32 if width < 512 else 64 if width < 2048 else 128
    heads = width // head_dim
    group = max(1, target.num_attention_heads // (getattr(target, "num_key_value_heads", None) or 1))
    kv_heads = max(k for k in range(1, heads + 1) if heads % k == 0 and k <= max(1, heads // group))
    return LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=width,
        intermediate_size=max(WIDTH_STEP, round(width * 7 / 3 / WIDTH_STEP) * WIDTH_STEP),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=target.max_position_embeddings,
        bos_token_id=target.bos_token_id,
        eos_token_id=target.eos_token_id,
        tie_word_embeddings=True,
    )


def check_share(found: int, target_parameters: int, share: float, what: str) -> None:
    """Refuse a draft of ``found`` parameters that are more than ``share`` of the target's.

    Raises:
        ValueError: with the share that would allow it.

    """
    if found > int(share * target_parameters):
        needed = math.ceil(100 * found / target_parameters) / 100
        raise ValueError(
            f"a draft of {what} has at least {needed:.0%} of the target's parameters; allow that with "
            f"--share {needed:.2f}"
        )


def derive(target: Any, target_parameters: int, share: float = LARGEST_SHARE, layers: int | None = None) -> LlamaConfig:
    """The widest draft configuration with at most ``share`` of the target's parameters.

    Args:
        target: the target's Hugging Face text configuration.
        target_parameters: how many parameters it has.
        share: largest share of these that the draft may have.
        layers: depth; by default a third of the target's, at most 4.

    Raises:
        ValueError: when even the narrowest draft has more parameters: the embeddings of a large vocabulary alone can.

    """
    depth = layers or min(MAX_LAYERS, max(1, target.num_hidden_layers // LAYERS_OF_TARGET))
    limit = int(share * target_parameters)
    narrowest = parameters(shaped(target, depth, WIDTH_STEP))
    what = f"{depth} layers with the target's vocabulary of {target.vocab_size} tokens"
    check_share(narrowest, target_parameters, share, what)
    # Bisection over multiples of the step; parameters grow with the width.
    low, high = 1, max(2, target.hidden_size // WIDTH_STEP * 4)
    while high - low > 1:
        middle = (low + high) // 2
        if parameters(shaped(target, depth, middle * WIDTH_STEP)) <= limit:
            low = middle
        else:
            high = middle
    return shaped(target, depth, low * WIDTH_STEP)
