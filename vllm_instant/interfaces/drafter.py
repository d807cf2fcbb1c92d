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
    """One request that wants draft tokens."""

    request_id: str
    token_ids: npt.NDArray[np.int32]
    """Shape ``[num_tokens]``: prompt and output, the newest token last. A view; do not write to it or keep it."""
    num_prompt_tokens: int
    max_draft_tokens: int
    """At least 1."""
    cache_salt: str = ""
    """What separates tenants: requests with another one must not learn what this one says."""
    is_fixed: bool = False
    """Whether its client asked for this draft length: what the draft costs does not count."""
    uncached_tokens: int = 0
    """Tokens that the draft model beside a ``HybridDrafter`` has not read yet; it reads them before it drafts."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Draft tokens with how sure the drafter is of them."""

    token_ids: Sequence[int]
    confidence: Sequence[float]
    """For each token the chance that it is accepted if those before it are, in 0..1. The speculation policy prices
    verification (``DraftCost``), and tokens that are not expected to earn their price are cut."""


@runtime_checkable
class Drafter(Protocol):
    """Proposes draft tokens. Runs in every worker process, after each step's tokens were sampled.

    With several workers each of them must propose the same tokens: decide from the arguments, never from a clock.
    """

    def propose(self, requests: Sequence[DraftRequest]) -> Sequence[Sequence[int] | Draft]:
        """For each request 0 to ``max_draft_tokens`` token ids that may come next, the nearest first."""
        ...

    def forget(self, request_id: str) -> None:
        """The request ended or was aborted. Optional."""
        return None


@dataclass(frozen=True, slots=True)
class DraftAssignment:
    """What one request gets from a drafter that shares the work with a draft model."""

    own: Sequence[int] = ()
    """Draft tokens of its own; used when ``num_draft_tokens`` is 0."""
    num_draft_tokens: int = 0
    """How many tokens the draft model shall draft for it instead."""


@runtime_checkable
class HybridDrafter(Drafter, Protocol):
    """A drafter beside a draft model that vLLM runs: it decides for each request and step who drafts.

    A plugin is one when it brings both ``build`` and ``engine_arguments`` (which configure the draft model).
    """

    def assign(self, requests: Sequence[DraftRequest], draft_cost: DraftCost) -> Sequence[DraftAssignment]:
        """One share a request. The draft model does not run when no request wants it."""
        ...

    def on_model_drafts(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """What the draft model then drafted, by request id: what becomes of it shows in the next ``token_ids``."""
        ...
