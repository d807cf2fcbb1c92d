"""The ``drafter`` slot: which tokens are proposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from vllm_instant.interfaces.speculation import DraftCost


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """One request of the step for which draft tokens are proposed."""

    request_id: str
    token_ids: npt.NDArray[np.int32]
    """int32 ``[num_tokens]``: prompt and output, the newest token last. A view, valid only during the call."""
    num_prompt_tokens: int
    """Number of leading ``token_ids`` that are the prompt."""
    max_draft_tokens: int
    """Maximum number of draft tokens, at least 1."""
    cache_salt: str = ""
    """The request's ``cache_salt``; its text must not leak to requests with another one."""
    is_fixed: bool = False
    """Whether the client fixed the number of draft tokens, so that the cost of drafts is ignored."""
    uncached_tokens: int = 0
    """Tokens without keys and values in the draft model of a ``HybridDrafter``, computed before its next draft."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Draft tokens with the drafter's confidence in each."""

    token_ids: Sequence[int]
    confidence: Sequence[float]
    """For each token the probability, in 0..1, that it is accepted if all tokens before it are. Tokens whose expected
    gain is below the cost of their verification (``DraftCost``) are trimmed."""


@runtime_checkable
class Drafter(Protocol):
    """Proposes draft tokens. Runs in every worker process, after the tokens of a step are sampled.

    All workers must propose the same tokens: results may depend on the arguments only, never on a clock.
    """

    def propose(self, requests: Sequence[DraftRequest]) -> Sequence[Sequence[int] | Draft]:
        """Return 0 to ``max_draft_tokens`` draft token ids for each request, in the order of the text."""
        ...

    def forget(self, request_id: str) -> None:
        """Drop the state of a request that ended or was aborted. Optional."""
        return None


@dataclass(frozen=True, slots=True)
class DraftAssignment:
    """Who drafts for one request: the plugin or the draft model."""

    own: Sequence[int] = ()
    """The plugin's draft token ids, used if ``num_draft_tokens`` is 0."""
    num_draft_tokens: int = 0
    """Number of tokens that the draft model drafts; 0 for none."""


@runtime_checkable
class HybridDrafter(Drafter, Protocol):
    """A drafter beside a draft model that vLLM runs; it decides per request and step which of the two drafts.

    Its plugin has both ``build`` and ``engine_arguments``, which configure the draft model.
    """

    def assign(self, requests: Sequence[DraftRequest], draft_cost: DraftCost) -> Sequence[DraftAssignment]:
        """Return one assignment per request. The draft model runs only if a request is assigned to it."""
        ...

    def on_model_drafts(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """Receive the draft model's tokens by request id; the next ``token_ids`` show which were accepted."""
        ...
