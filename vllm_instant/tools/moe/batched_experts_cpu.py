"""Mixtures of many small experts on a CPU: all experts of a layer as one batched matrix product."""

from __future__ import annotations

import types
from typing import Any

import torch


def use_batched_experts(model: Any) -> None:
    """Replace the expert loop of a Hugging Face model by one batched product wherever experts are stacked tensors.

    The result is the same; training and long evaluations of models with many small experts are several times faster.
    Memory grows with the number of tokens of the busiest expert.
    """
    for module in model.modules():
        if all(hasattr(module, name) for name in ("gate_up_proj", "down_proj", "act_fn", "num_experts")):
            module.forward = types.MethodType(_batched_forward, module)


def _batched_forward(self: Any, hidden: torch.Tensor, picks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Pack tokens into ``[experts, capacity, width]`` with the capacity of the busiest expert; no token is dropped."""
    num_tokens, width = hidden.shape
    num_experts, top_k = self.num_experts, picks.shape[1]
    expert_of = picks.flatten()
    counts = torch.bincount(expert_of, minlength=num_experts)
    capacity = int(counts.max())
    # The position of a token among the tokens of its expert: its place in the sorted order minus the expert's start.
    order = expert_of.argsort(stable=True)
    position = torch.empty_like(expert_of)
    position[order] = torch.arange(len(expert_of)) - (counts.cumsum(0) - counts)[expert_of[order]]
    slot = expert_of * capacity + position
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    tokens = hidden.to(dtype)[torch.arange(num_tokens).repeat_interleave(top_k)]
    packed = tokens.new_zeros(num_experts * capacity, width).index_copy(0, slot, tokens)
    packed = packed.view(num_experts, capacity, width)
    gate, up = torch.bmm(packed, self.gate_up_proj.transpose(1, 2)).chunk(2, -1)
    out = torch.bmm(self.act_fn(gate) * up, self.down_proj.transpose(1, 2)).view(num_experts * capacity, width)
    result: torch.Tensor = (out[slot].view(num_tokens, top_k, width) * weights[..., None].to(dtype)).sum(1)
    return result.to(hidden.dtype)
