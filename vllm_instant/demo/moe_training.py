"""What training a mixture of experts needs beside the loop that all of the project's models share."""

from __future__ import annotations

import types
from typing import Any

import torch

from vllm_instant.distillation.objectives import FORWARD_KL, head_distance
from vllm_instant.distillation.teacher import TaughtWindows, Teacher
from vllm_instant.distillation.training import Loss, Training

BALANCE = 0.005
"""Weight of the load-balancing loss, which is at least the number of experts that a token chooses."""


def load_imbalance(router_logits: torch.Tensor, chosen: int) -> torch.Tensor:
    """The load-balancing loss of one layer over all tokens of a step (Fedus et al. 2022, equation 4).

    Taken over the whole step and not over each sequence, so that experts may specialise in a kind of text.

    Args:
        router_logits: float32 ``[tokens, experts]``.
        chosen: how many experts a token chooses.

    Returns:
        A scalar: ``chosen`` when every expert gets the same share, more otherwise.

    """
    probabilities = router_logits.float().softmax(-1)
    experts = probabilities.shape[-1]
    picks = torch.nn.functional.one_hot(probabilities.topk(chosen, -1).indices, experts).sum(1).float()
    return experts * (picks.mean(0) * probabilities.mean(0)).sum()


def loss_of(windows: TaughtWindows, teacher: Teacher, plan: Training) -> Loss:
    """Forward KL divergence from the dense model it was made of, and the load-balancing loss."""

    def loss(model: Any, step: int, progress: float) -> torch.Tensor:
        tokens, states = windows.batch(step, plan.batch)
        output = model.base_model(input_ids=tokens, output_router_logits=True)
        hidden = output.last_hidden_state.flatten(0, 1).to(torch.bfloat16)
        head = model.get_output_embeddings().weight
        distance = head_distance(hidden, head, states.flatten(0, 1), teacher.probabilities, FORWARD_KL)
        chosen = model.config.num_experts_per_tok
        balance = torch.stack([load_imbalance(logits, chosen) for logits in output.router_logits]).mean()
        return distance + BALANCE * (balance - chosen)

    return loss


def train_side_by_side(model: Any) -> None:
    """Let a Mixtral model's experts work as one batched product: what many small experts on a CPU need."""
    for layer in model.model.layers:
        layer.mlp.experts.forward = types.MethodType(_batched, layer.mlp.experts)


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
