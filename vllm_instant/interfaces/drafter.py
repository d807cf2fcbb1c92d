"""The ``drafter`` slot: which tokens are proposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from vllm_instant.interfaces.speculation import DraftCost

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """One request of the step for which draft tokens are proposed."""

    request_id: str
    token_ids: npt.NDArray[np.int32]
    """int32 ``[num_tokens]``: prompt and output, the newest token last. A view, valid only during the call."""
    num_prompt_tokens: int
    """Number of leading ``token_ids`` that are the prompt."""
    max_draft_tokens: int
    """Maximum number of draft tokens, at least 1; 0 only for a ``FollowingDrafter``."""
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


class PushedTail(NamedTuple):
    """Draft tokens that a client sends for its own request; positions count output tokens."""

    branch: int
    """Number of the branch that the tokens extend, increasing."""
    base: int
    """Number of output tokens that the branch continues."""
    position: int
    """Position of the first token: ``base`` for a new branch, otherwise where the branch ended so far."""
    seen: int
    """Number of output tokens that the client knew, at least ``base``."""
    tokens: Sequence[int]
    probabilities: bytes
    """For each token the drafter's probability in steps of 1/255; empty where it states none."""


@runtime_checkable
class FollowingDrafter(Drafter, Protocol):
    """A drafter that sees all tokens of all requests, also in steps after which nothing is drafted.

    ``propose`` gets every request that sampled a token; those without drafts have ``max_draft_tokens`` 0. Its drafts
    may depend on when something arrives, so that it needs an engine with one worker.
    """

    def enter(self, request: DraftRequest) -> None:
        """A request's prompt is about to be read to its end; ``max_draft_tokens`` is 0."""
        ...

    def receive(self, pushed: Mapping[str, Sequence[PushedTail]]) -> None:
        """Receive the drafts that clients sent since the last step, by request id, before ``propose``."""
        ...


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


@dataclass(frozen=True, slots=True)
class DeviceDraftBatch:
    """The requests of a step whose newest tokens are on the device only; tensors are views of vLLM's own buffers.

    Reading a tensor's values on the host would wait for the device in each step.
    """

    request_ids: Sequence[str]
    """By index in the batch."""
    cache_salts: Mapping[str, str]
    """Cache salt by request id, without the requests that have none."""
    num_draft_tokens: int
    """Number of tokens that are verified per request, at least 1."""
    token_ids: torch.Tensor
    """int32 ``[max_num_seqs, max_model_len]``: prompts and outputs, by row; this step's tokens are the last ones."""
    num_tokens: torch.Tensor
    """int32 ``[max_num_seqs]``: number of tokens in each row."""
    rows: torch.Tensor
    """int64 ``[requests]``: row of each request of the batch."""
    num_sampled: torch.Tensor
    """int32 ``[requests]``: number of tokens that each request sampled in this step; 0 while it reads its prompt."""
    max_num_tokens: int
    """Upper bound of ``num_tokens`` of these requests, known on the host."""
    num_rejected: torch.Tensor
    """int32 ``[requests]``: draft tokens that were rejected in this step. ``num_sampled - 1`` were accepted."""


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """A request that has ended, whose row is still in place."""

    request_id: str
    row: int
    num_prompt_tokens: int
    max_num_tokens: int
    """Upper bound of its number of tokens."""
    token_ids: torch.Tensor
    """int32 ``[max_num_seqs, max_model_len]``, as in ``DeviceDraftBatch``."""
    num_tokens: torch.Tensor
    """int32 ``[max_num_seqs]``."""


@runtime_checkable
class DeviceDrafter(Protocol):
    """Proposes draft tokens on the device, under asynchronous scheduling: for vLLM's V2 model runner.

    Its plugin has ``build_on_device``. All workers must propose the same tokens.
    """

    def propose_on_device(self, batch: DeviceDraftBatch) -> torch.Tensor:
        """Return draft token ids, int64 ``[requests, num_speculative_tokens]`` on the device.

        The first ``num_draft_tokens`` columns are verified. vLLM may overwrite the tensor before the next call.
        """
        ...

    def forget_on_device(self, request: DeviceRequest) -> None:
        """Drop the state of a request that ended or was aborted. Optional."""
        return None


@runtime_checkable
class HybridDeviceDrafter(DeviceDrafter, Protocol):
    """A ``DeviceDrafter`` beside a draft model that vLLM runs in every step with drafts.

    Its plugin has both ``build_on_device`` and ``engine_arguments``, which configure the draft model.
    """

    def prefers_own(self, batch: DeviceDraftBatch) -> torch.Tensor:
        """Return bool ``[requests]`` on the device: whose drafts of ``propose_on_device`` replace the model's.

        Called after ``propose_on_device`` with the same batch.
        """
        ...
