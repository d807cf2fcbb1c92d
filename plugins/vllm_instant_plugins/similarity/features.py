"""Features of a request that predict its output length, from its token ids and sampling parameters alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_instant import RequestState

DIMENSIONS = 4096
"""Number of weights of ``LengthRegressor``, dense features included."""
NUM_TAIL_TOKENS, NUM_HEAD_TOKENS, NUM_PAIR_TOKENS = 96, 32, 32
"""Prompt tokens used as features: the question is at the end of a prompt, its system prompt at the beginning."""
CONTEXT_KINDS = ("all", "prompt group", "prompt length", "limits", "regression", "regression over all groups")

Contexts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class SparseFeatures:
    """The non-zero features of one request."""

    indices: npt.NDArray[np.intp]
    values: npt.NDArray[np.float64]


def contexts(request: RequestState, log2_length: float) -> Contexts:
    """The request's context of each of ``CONTEXT_KINDS``; ``log2_length`` is the prediction of ``LengthRegressor``."""
    group = request.prompt_group
    temperature = min(round(request.temperature * 2), 4)
    return (
        (),
        (group,),
        (group, _half_octaves(request.num_prompt_tokens)),
        (group, _half_octaves(request.max_tokens), temperature, int(request.structured_output)),
        (group, int(request.structured_output), round(2 * log2_length)),
        # For traffic in which every prompt begins differently, so that groups hold one request each.
        (round(2 * log2_length),),
    )


def _half_octaves(count: int) -> int:
    return round(2 * float(np.log2(max(1, count))))


class LengthRegressor:
    """Linear regression of the base-2 logarithm of the output length, trained online.

    Features are the prompt length, the limits, and the tokens and token pairs at the ends of the prompt, hashed into
    ``DIMENSIONS`` weights (Weinberger et al. 2009). Step sizes are per feature (AdaGrad; Duchi, Hazan, Singer 2011).
    """

    def __init__(self) -> None:
        self.weights = np.zeros(DIMENSIONS)
        self._squared_gradients = np.full(DIMENSIONS, 1e-2)

    def features(self, request: RequestState) -> SparseFeatures:
        """The features of a request."""
        dense = np.array(
            [
                1.0,
                np.log2(max(1, request.num_prompt_tokens)) / 8,
                np.log2(max(1, request.max_tokens)) / 8,
                min(request.temperature, 2.0),
                float(request.structured_output),
            ]
        )
        tail = np.asarray(request.prompt_token_ids[-NUM_TAIL_TOKENS:], np.int64)
        end = tail[-NUM_PAIR_TOKENS:]
        pairs = end[:-1] * 31_337 + end[1:]
        head = np.asarray(request.prompt_token_ids[:NUM_HEAD_TOKENS], np.int64)
        # One multiplicative hash per kind of feature; the low bits of a product are poorly mixed and are dropped.
        hashes = np.concatenate([tail * 2_654_435_761, pairs * 2_246_822_519 + 1, head * 3_266_489_917 + 2])
        sparse = np.unique((hashes >> 7) % (DIMENSIONS - len(dense))) + len(dense)
        # The hashed features together have norm 1, whatever the length of the prompt.
        values = np.full(len(dense) + len(sparse), 1 / np.sqrt(max(1, len(sparse))))
        values[: len(dense)] = dense
        return SparseFeatures(np.concatenate([np.arange(len(dense)), sparse]), values)

    def predict(self, features: SparseFeatures) -> float:
        """The predicted base-2 logarithm of the output length."""
        return float(np.clip(self.weights[features.indices] @ features.values, 0.0, 20.0))

    def learn(self, features: SparseFeatures, num_tokens: int, truncated: bool) -> None:
        """One gradient step; a ``truncated`` output (ended by its limit) teaches only that the length is greater."""
        where = features.indices
        error = np.log2(max(1, num_tokens)) - float(self.weights[where] @ features.values)
        if truncated and error < 0:
            return
        gradient = np.clip(error, -3.0, 3.0) * features.values
        self._squared_gradients[where] += gradient**2
        self.weights[where] += 0.5 * gradient / np.sqrt(self._squared_gradients[where])
