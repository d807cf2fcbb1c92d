"""Many small experts on a CPU: all of a layer's experts as one batched product."""

from __future__ import annotations

import types
from typing import Any

import torch


def side_by_side(model: Any) -> None:
    """Let the experts of a Hugging Face model work as one batched product, wherever they are stored as one tensor.

    The result is the same; training and long evaluations of models with many small experts are several times faster
    than one expert after the other. Memory grows with the load of the busiest expert.
    """
    for module in model.modules():
        if all(hasattr(module, name) for name in ("gate_up_proj", "down_proj", "act_fn", "num_experts")):
            module.forward = types.MethodType(_batched, module)


def _batched(self: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Tokens sorted to their experts, in as many places an expert as the busiest one needs; nothing is dropped."""
    tokens, width = hidden.shape
    experts, picks = self.num_experts, chosen.shape[1]
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=experts)
    places = int(counts.max())
    order = flat.argsort(stable=True)
    position = torch.empty_like(flat)
    position[order] = torch.arange(len(flat)) - (counts.cumsum(0) - counts)[flat[order]]
    slot = flat * places + position
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    source = hidden.to(dtype)[torch.arange(tokens).repeat_interleave(picks)]
    packed = source.new_zeros(experts * places, width).index_copy(0, slot, source).view(experts, places, width)
    gate, up = torch.bmm(packed, self.gate_up_proj.transpose(1, 2)).chunk(2, -1)
    out = torch.bmm(self.act_fn(gate) * up, self.down_proj.transpose(1, 2)).view(experts * places, width)
    result: torch.Tensor = (out[slot].view(tokens, picks, width) * weights[..., None].to(dtype)).sum(1)
    return result.to(hidden.dtype)
