"""Where a draft starts: at what its target knows already.

A new, narrow draft takes over in which directions the target tells tokens apart: with random embeddings much of a
short training goes into finding out which tokens are alike. The target knows: the rows of its output matrix, after its
final norm's weights, projected to as many principal directions as the draft is wide.

A draft of the target's own width takes over its embeddings, its first layers, its last norm and its output matrix
(depth pruning: Sajjad et al. 2023, "On the effect of dropping layers of pre-trained transformer models"). The first
layers are the ones that read embeddings; what the others added to the output is learned.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")

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


def first_layers(target: Any, layers: int) -> Any:
    """A model like ``target``, a Hugging Face causal language model, with only its first ``layers`` layers, float32.

    Raises:
        ValueError: when the target has not more layers than that, or keeps them where this cannot find them.

    """
    import transformers

    config = target.config
    if layers >= (depth := getattr(config, "num_hidden_layers", 0)):
        raise ValueError(f"the target has {depth} layers: a draft must have fewer than that, found {layers}")
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        shorter.layer_types = config.layer_types[:layers]
    draft = transformers.AutoModelForCausalLM.from_config(shorter, dtype=torch.float32)
    wanted = {
        name: value.float() if value.is_floating_point() else value
        for name, value in target.state_dict().items()
        if (found := _LAYER.search(name)) is None or int(found[1]) < layers
    }
    try:
        draft.load_state_dict(wanted)
    except RuntimeError as error:
        raise ValueError(f"the layers of {type(target).__name__} cannot be taken one by one") from error
    return draft
