"""A mixture of experts without a server, with batch-aware routing as in a server's decode steps.

A window of text stands for a request: its first tokens for the prompt, the rest for the answer. All answers of a batch
are processed in one forward pass, and the tokens at one position of all windows are routed together, as if the requests
had been decoded side by side. Attention sees the restricted routing of earlier tokens, as in a server. One pass over
the windows therefore replaces thousands of decode steps.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_instant.moe.routing_trace import RoutedModel, Trace
from vllm_instant.tools.moe import budgets
from vllm_instant.tools.moe.batched_experts_cpu import use_batched_experts

Policy = Callable[[int, npt.NDArray[np.float32]], npt.NDArray[np.bool_]]
"""(layer, router logits ``[batches, steps, rows, experts]``) → allowed experts, bool ``[batches, steps, experts]``."""

SUPPORTED_MODELS = "Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE"


class ModelError(ValueError):
    """A model that cannot be evaluated offline; the message is one sentence."""


class OfflineModel:
    """A Hugging Face mixture of experts on the CPU, in float32.

    Args:
        folder: a folder or a Hugging Face model name.

    Raises:
        ModelError: if it cannot be loaded, or does not route by softmax and top-k.

    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from None
        use_batched_experts(self.model)
        self._routers = [m for m in self.model.modules() if type(m).__name__.endswith("TopKRouter")]
        if not self._routers or not all(hasattr(m, "top_k") and hasattr(m, "weight") for m in self._routers):
            raise ModelError(
                f"{folder} has no routers that can be restricted offline; supported are models like {SUPPORTED_MODELS}"
            )
        first = self._routers[0]
        self.routed = RoutedModel(
            Path(folder).name,
            layers=len(self._routers),
            experts=int(first.weight.shape[0]),
            top_k=int(first.top_k),
            renormalise=bool(getattr(first, "norm_topk_prob", True)),
        )
        self._restrict: Callable[[int, torch.Tensor], torch.Tensor] | None = None
        self._routing: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for layer, router in enumerate(self._routers):
            router.forward = types.MethodType(self._forward_of(layer, router.forward), router)

    def _forward_of(self, layer: int, native: Any) -> Any:
        def forward(_: Any, hidden: torch.Tensor) -> Any:
            logits, weights, picks = native(hidden)
            restricted = logits
            if self._restrict is not None:
                restricted = self._restrict(layer, logits)
                picks = restricted.topk(self.routed.top_k, -1).indices
                # Softmax over all logits: without renormalisation, refusing experts must not raise other weights.
                weights = logits.float().softmax(-1).gather(-1, picks)
                if self.routed.renormalise:
                    weights = weights / weights.sum(-1, keepdim=True)
                weights = weights.to(logits.dtype)
            self._routing.append((logits, weights, picks))
            return logits, weights, picks

        return forward

    def read(
        self, windows: torch.Tensor, prompt: int = 0, batch: int = 1, policy: Policy | None = None
    ) -> tuple[torch.Tensor, list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]]:
        """Run the model on windows of text, with native or restricted routing.

        Args:
            windows: int64 ``[windows, context]``; the windows of one batch are adjacent.
            prompt: number of first tokens, which are routed natively.
            batch: number of windows decoded side by side; it must divide their number.
            policy: the experts that a batch may use; None for native routing.

        Returns:
            Logits float32 ``[windows, context, vocabulary]``, and for each layer the native router logits
            ``[windows, context, experts]``, the weights and the picked experts ``[windows, context, top_k]``.

        """
        count, context = windows.shape
        if count % batch:
            raise ValueError(f"{count} windows are not a multiple of the batch size {batch}")

        def restrict(layer: int, logits: torch.Tensor, policy: Policy) -> torch.Tensor:
            # [windows * context, experts] -> [batches, steps, rows, experts]
            table = logits.float().view(count // batch, batch, context, -1)[:, :, prompt:].transpose(1, 2)
            allowed = torch.from_numpy(policy(layer, table.numpy()))
            mask = torch.ones(count // batch, batch, context, logits.shape[-1], dtype=torch.bool)
            mask[:, :, prompt:] = allowed[:, None]
            return logits.masked_fill(~mask.view(logits.shape), float("-inf"))

        self._restrict = partial(restrict, policy=policy) if policy is not None else None
        self._routing.clear()
        with torch.inference_mode():
            logits: torch.Tensor = self.model(input_ids=windows).logits
        self._restrict = None
        routing = [tuple(part.view(count, context, -1).numpy() for part in layer) for layer in self._routing]
        self._routing.clear()
        return logits, routing

    def trace(
        self, windows: torch.Tensor, classes: Sequence[str], prompt: int, batch: int = 16, windows_per_pass: int = 32
    ) -> Trace:
        """The native routing of windows, in the form that `experts trace` records.

        Args:
            windows: int64 ``[windows, context]``; each is one request.
            classes: the prompt class of each window.
            prompt: number of first tokens that count as prompt.
            batch: requests per batch.
            windows_per_pass: windows per forward pass.

        """
        context = windows.shape[1]
        experts, weights = [], []
        for part in windows.split(windows_per_pass):
            _, routing = self.read(part)
            experts.append(np.stack([picks for _, _, picks in routing], 2).astype(np.int16))
            weights.append(np.stack([weight for _, weight, _ in routing], 2).astype(np.float16))
        names = tuple(dict.fromkeys(classes))
        request = np.repeat(np.arange(len(windows), dtype=np.int32), context)
        place = np.tile(np.arange(context), len(windows))
        shape = (len(request), self.routed.layers, self.routed.top_k)
        return Trace(
            self.routed,
            np.concatenate(experts).reshape(shape),
            np.concatenate(weights).reshape(shape),
            request,
            # A prompt is processed in its own step, before the steps that the batch shares.
            np.where(
                place < prompt,
                request // batch * (context + batch) + request % batch,
                request // batch * (context + batch) + batch + place,
            ).astype(np.int64),
            place < prompt,
            np.array([names.index(name) for name in classes], np.int16),
            names,
        )


def budget_policy(
    top_k: int,
    keep: int,
    budget: int,
    cluster: npt.NDArray[np.int64] | None = None,
    cohesion: float = 0.0,
    prior: npt.NDArray[np.float64] | None = None,
) -> Policy:
    """The rule of ``budgets.select_experts``; ``cluster`` and ``prior`` are ``[layers, experts]``."""

    def policy(layer: int, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        return budgets.select_experts(
            logits,
            top_k,
            keep,
            budget,
            None if prior is None else prior[layer],
            cluster=None if cluster is None else cluster[layer],
            cohesion=cohesion,
        ).experts

    return policy


def cluster_policy(top_k: int, clusters: int, cluster: npt.NDArray[np.int64]) -> Policy:
    """The rule of ``budgets.select_clusters``; ``cluster`` is ``[layers, experts]``."""

    def policy(layer: int, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        return budgets.select_clusters(logits, top_k, clusters, cluster[layer]).experts

    return policy
