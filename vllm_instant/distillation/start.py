"""Where a draft's token embeddings start: at the directions in which the target tells tokens apart.

With random embeddings much of a short training goes into finding out which tokens are alike. The target knows: the rows
of its output matrix, after its final norm's weights, projected to as many principal directions as the draft is wide.
"""

from __future__ import annotations

from typing import Any

import torch

EMBEDDING_DEVIATION = 0.02
"""Standard deviation of Llama's own initialisation."""


def start_at_target(draft: Any, target: Any) -> None:
    """Set the (tied) embeddings of ``draft``, a fresh Hugging Face model, from those of ``target``, its teacher.

    Nothing changes when the draft is as wide as the target or wider.
    """
    embeddings = draft.get_input_embeddings().weight
    head = target.get_output_embeddings().weight.float()
    width = embeddings.shape[1]
    if width >= head.shape[1]:
        return
    norm = getattr(target.base_model, "norm", None)
    if norm is not None and getattr(norm, "weight", None) is not None:
        head = head * norm.weight.float()
    # The right singular vectors from the small Gram matrix: the vocabulary may have hundreds of thousands of rows.
    with torch.no_grad():
        _, directions = torch.linalg.eigh(head.T @ head)  # rising eigenvalues
        projected = head @ directions[:, -width:]
        embeddings.copy_(projected * (EMBEDDING_DEVIATION / projected.std()))
