"""What training a mixture of experts needs beside the loop that all of the project's models share."""

from __future__ import annotations

from typing import Any

import torch

from vllm_instant.tools.distill.losses import FORWARD_KL, head_distance
from vllm_instant.tools.distill.teacher import TaughtWindows, Teacher
from vllm_instant.tools.distill.training import Loss, Training

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
        distance = head_distance(hidden, head, states.flatten(0, 1), teacher.logits, FORWARD_KL)
        chosen = model.config.num_experts_per_tok
        balance = torch.stack([load_imbalance(logits, chosen) for logits in output.router_logits]).mean()
        return distance + BALANCE * (balance - chosen)

    return loss
