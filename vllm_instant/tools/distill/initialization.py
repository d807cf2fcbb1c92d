"""Initialises a draft model from its target.

A new, narrow draft gets the target's embeddings in few dimensions: the rows of the target's output matrix, times the
weights of its final norm, projected to as many principal directions as the draft is wide. With random embeddings a
short training is spent largely on learning which tokens are similar.

A draft of the target's own width gets its embeddings, some of its layers, its last norm and its output matrix (as in
DistilBERT: Sanh et al. 2019). The first and the last layer are among them if there are at least two: the first is
trained to read embeddings, the last to feed the output matrix.
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


def spread(layers: int, of: int) -> list[int]:
    """Indices of ``layers`` layers, evenly spaced from the first to the last; a single one is the first."""
    return [round(i * (of - 1) / max(1, layers - 1)) for i in range(layers)]


def layers_of(target: Any, layers: int) -> Any:
    """A float32 copy of ``target``, a Hugging Face causal language model, with only some of its layers.

    Raises:
        ValueError: when the target does not have more layers than that, or does not number them in its state dict.

    """
    import transformers

    config = target.config
    if layers >= (depth := getattr(config, "num_hidden_layers", 0)):
        raise ValueError(f"the target has {depth} layers: a draft must have fewer than that, found {layers}")
    taken = spread(layers, depth)
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        shorter.layer_types = [config.layer_types[i] for i in taken]
    draft = transformers.AutoModelForCausalLM.from_config(shorter, dtype=torch.float32)
    places = {str(number): str(place) for place, number in enumerate(taken)}
    wanted = {}
    for name, value in target.state_dict().items():
        found = _LAYER.search(name)
        if found is not None:
            if found[1] not in places:
                continue
            name = f"{name[: found.start(1)]}{places[found[1]]}{name[found.end(1) :]}"
        wanted[name] = value.float() if value.is_floating_point() else value
    try:
        draft.load_state_dict(wanted)
    except RuntimeError as error:
        raise ValueError(f"the layers of {type(target).__name__} cannot be taken one by one") from error
    return draft
