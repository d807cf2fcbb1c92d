"""What is known of a request before it says anything, as groups whose answers may be alike in length.

Everything comes from token ids and sampling parameters: an engine core sees no text. A request belongs to one context
of each kind; ``lengths`` keeps a distribution for each context and finds out which kinds tell most.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_instant import RequestState

DIMENSIONS = 4096
"""Size of the linear model that ``Scorer`` learns."""
TAIL, HEAD, PAIRED = 96, 32, 32
"""So many last and first prompt tokens are looked at: what is asked stands at the end, who asks at the beginning."""
KINDS = ("everybody", "prompt class", "prompt length", "limits", "score", "score of all")
LONG_PREFIX = 128

Contexts = tuple[tuple[int, ...], ...]


def prefix_group(request: RequestState) -> int:
    """The same for requests that share a long beginning of their prompts; 0 for a short prompt."""
    if len(request.prompt_token_ids) < LONG_PREFIX:
        return 0
    return hash((request.cache_salt, *request.prompt_token_ids[:LONG_PREFIX]))


def contexts(request: RequestState, score: float) -> Contexts:
    """One context of each of ``KINDS``; ``score`` is what ``Scorer`` expects."""
    kind = request.prompt_group
    temperature = min(round(request.temperature * 2), 4)
    return (
        (),
        (kind,),
        (kind, _octaves(request.num_prompt_tokens, 2)),
        (kind, _octaves(request.max_tokens, 2), temperature, int(request.structured_output)),
        (kind, int(request.structured_output), round(2 * score)),
        # Where every prompt begins in its own way.
        (round(2 * score),),
    )


def _octaves(count: int, parts: int) -> int:
    return round(parts * float(np.log2(max(1, count))))


class Scorer:
    """A linear model of the logarithm (base 2) of the output length, learned request by request.

    Features: prompt length, limits, and which tokens and pairs of tokens stand at the ends of the prompt, hashed into
    ``DIMENSIONS`` weights. Steps are normalised by feature (AdaGrad; Duchi, Hazan, Singer 2011).
    """

    def __init__(self) -> None:
        self.weights = np.zeros(DIMENSIONS)
        self._squares = np.full(DIMENSIONS, 1e-2)

    def features(self, request: RequestState) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """Indices into the weights and values, of one request."""
        dense = np.array(
            [
                1.0,
                np.log2(max(1, request.num_prompt_tokens)) / 8,
                np.log2(max(1, request.max_tokens)) / 8,
                min(request.temperature, 2.0),
                float(request.structured_output),
            ]
        )
        tokens = np.asarray(request.prompt_token_ids[-TAIL:], np.int64)
        end = tokens[-PAIRED:]
        pairs = end[:-1] * 31_337 + end[1:]
        head = np.asarray(request.prompt_token_ids[:HEAD], np.int64)
        hashed = np.concatenate([tokens * 2_654_435_761, pairs * 2_246_822_519 + 1, head * 3_266_489_917 + 2])
        sparse = np.unique((hashed >> 7) % (DIMENSIONS - len(dense))) + len(dense)
        values = np.full(len(dense) + len(sparse), 1 / np.sqrt(max(1, len(sparse))))
        values[: len(dense)] = dense
        return np.concatenate([np.arange(len(dense)), sparse]), values

    def score(self, features: tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]) -> float:
        """Logarithm (base 2) of the length that is expected."""
        where, values = features
        return float(np.clip(self.weights[where] @ values, 0.0, 20.0))

    def learn(self, features: tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]], tokens: int, cut_off: bool) -> None:
        """The request said so many tokens; ``cut_off``: it would have said more."""
        where, values = features
        error = np.log2(max(1, tokens)) - float(self.weights[where] @ values)
        if cut_off and error < 0:
            return
        gradient = np.clip(error, -3.0, 3.0) * values
        self._squares[where] += gradient**2
        self.weights[where] += 0.5 * gradient / np.sqrt(self._squares[where])
