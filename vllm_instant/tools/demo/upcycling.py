"""From a dense model to a mixture of experts: the neurons of each feed-forward layer become the experts.

Neurons that fire together are put into groups of equal size (Zhang et al. 2022, "MoEfication"), and each group is
copied into two or three experts, a little different from each other ("upcycling", Komatsuzaki et al. 2023). The router
starts as the linear map that best predicts how much each group contributes for a token; the copies of a group divide
the tokens that choose it. So routing depends on the token from the start, and training continues from a
model that still knows most of what the dense one did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_instant.tools.moe.grouping import balanced_groups

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

ROUTER_DEVIATION = 1.5
"""Standard deviation of the starting router's logits over experts: peaked enough that the choice means something."""
SPLIT = 1.0
"""How far the copies of a group differ in their logits, in units of the deviation."""
NOISE = 0.05
"""Noise on a copy's weights, relative to their own deviation."""


@dataclass(frozen=True)
class Experts:
    """How many experts a layer has, how many a token chooses, and how many neurons one has."""

    count: int
    chosen: int
    size: int


def config(base: Any, experts: Experts) -> MixtralConfig:
    """The Mixtral configuration whose attention and embeddings are those of a Llama configuration."""
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=base.vocab_size,
        hidden_size=base.hidden_size,
        intermediate_size=experts.size,
        num_hidden_layers=base.num_hidden_layers,
        num_attention_heads=base.num_attention_heads,
        num_key_value_heads=base.num_key_value_heads,
        head_dim=base.head_dim,
        num_local_experts=experts.count,
        num_experts_per_tok=experts.chosen,
        max_position_embeddings=base.max_position_embeddings,
        rms_norm_eps=base.rms_norm_eps,
        rope_parameters=base.rope_parameters,
        bos_token_id=base.bos_token_id,
        eos_token_id=base.eos_token_id,
        tie_word_embeddings=base.tie_word_embeddings,
        sliding_window=None,
    )


def upcycle(base: LlamaForCausalLM, tokens: torch.Tensor, experts: Experts, seed: int = 0) -> MixtralForCausalLM:
    """The mixture of experts that training starts from, float32.

    Args:
        base: a dense model, float32.
        tokens: int64 ``[windows, context]``, text on which neurons are watched.
        experts: the shape of a layer; ``count * size`` must be at least the base's neurons of a layer, and these a
            multiple of ``size``.
        seed: of grouping and noise.

    Raises:
        ValueError: when the neurons cannot be divided so.

    """
    from transformers import MixtralForCausalLM

    neurons = base.config.intermediate_size
    if neurons % experts.size or experts.count * experts.size < neurons:
        raise ValueError(
            f"{neurons} neurons cannot be divided among {experts.count} experts of {experts.size}: "
            "an expert's size must divide them, and all experts together must have room for them"
        )
    new = MixtralForCausalLM(config(base.config, experts)).float()
    shared = {name: value for name, value in base.state_dict().items() if ".mlp." not in name}
    missing = new.load_state_dict(shared, strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"the base has weights that a mixture of experts has no place for: {missing.unexpected_keys}")
    generator = torch.Generator().manual_seed(seed)
    inputs = feed_forward_inputs(base, tokens)
    with torch.no_grad():
        for layer, (dense, watched) in enumerate(zip(base.model.layers, inputs, strict=True)):
            _fill(new.model.layers[layer].mlp, dense.mlp, watched, experts, seed, generator)
    return new.eval()


def feed_forward_inputs(base: LlamaForCausalLM, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What each layer's feed-forward part reads, float32 ``[tokens, width]`` for each layer."""
    seen: list[list[torch.Tensor]] = [[] for _ in base.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, arguments, store=store: store.append(arguments[0].flatten(0, 1)))
        for layer, store in zip(base.model.layers, seen, strict=True)
    ]
    with torch.inference_mode():
        for window in tokens.split(4):
            base.model(input_ids=window)
    for hook in hooks:
        hook.remove()
    return [torch.cat(store) for store in seen]


def _fill(
    block: Any, dense: Any, inputs: torch.Tensor, experts: Experts, seed: int, generator: torch.Generator
) -> None:
    gate, up, down = dense.gate_proj.weight, dense.up_proj.weight, dense.down_proj.weight
    activations = torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
    contributions = activations.abs() * down.norm(dim=0)
    # Neurons that are large for the same tokens: correlation of how large they are, negative ones cut off.
    affinity = np.corrcoef(contributions.log1p().numpy().T).clip(0.0)
    groups = torch.from_numpy(balanced_groups(affinity, gate.shape[0] // experts.size, seed, starts=2))
    members = [torch.nonzero(groups == group).flatten() for group in range(int(groups.max()) + 1)]
    size = torch.stack([(activations[:, own] @ down[:, own].T).norm(dim=1) for own in members], 1)
    logits = linear_fit(inputs, size.clamp_min(1e-6).log())

    copies = _copies(size.mean(0), experts.count)
    rows, order = [], []
    for group, count in enumerate(copies):
        first, second = _main_directions(inputs, size[:, group])
        for copy in range(count):
            angle = 2 * math.pi * copy / count
            split = math.cos(angle) * first + math.sin(angle) * second if count > 1 else torch.zeros_like(first)
            rows.append(logits[:, group] + SPLIT * split / (inputs @ split).std().clamp_min(1e-6))
            order.append((group, copy))
    router = torch.stack(rows)
    spread = (inputs @ router.T).std(dim=1).mean()
    block.gate.weight.copy_(router * (ROUTER_DEVIATION / spread))

    for expert, (group, copy) in enumerate(order):
        own = members[group]
        weights = [torch.cat([gate[own], up[own]]), down[:, own]]
        if copy:
            weights = [w + NOISE * w.std() * torch.randn(w.shape, generator=generator) for w in weights]
        block.experts.gate_up_proj[expert].copy_(weights[0])
        block.experts.down_proj[expert].copy_(weights[1])
    # A token's routing weights sum to one, where the dense layer adds up all groups: fit one factor for the layer.
    wanted = activations @ down.T
    found = block(inputs[None])[0]
    block.experts.down_proj.mul_((wanted * found).sum() / (found * found).sum())


def linear_fit(inputs: torch.Tensor, values: torch.Tensor, ridge: float = 1e-2) -> torch.Tensor:
    """Ridge regression: the linear map ``[width, columns]`` from ``inputs`` to ``values``, columns at deviation 1."""
    standard = (values - values.mean(0)) / values.std(0).clamp_min(1e-6)
    gram = inputs.T @ inputs
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solved = torch.linalg.solve(gram, inputs.T @ standard)
    return solved / (inputs @ solved).std(0).clamp_min(1e-6)


def _copies(importance: torch.Tensor, total: int) -> list[int]:
    """How many experts each group becomes: equally many, one more for the most important ones."""
    groups = len(importance)
    copies = [total // groups] * groups
    for group in importance.argsort(descending=True)[: total % groups].tolist():
        copies[group] += 1
    return copies


def _main_directions(inputs: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two directions in which those inputs differ most for which a group contributes much."""
    strong = inputs[size > size.median()]
    strong = strong - strong.mean(0)
    _, vectors = torch.linalg.eigh(strong.T @ strong)
    return vectors[:, -1], vectors[:, -2]
