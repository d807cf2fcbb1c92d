"""The ``hybrid`` drafter: lookup where it is confident, the draft model where that gains more, or neither.

Running the draft model costs every request of the step, so that it is one decision for all: the number of draft steps
at which the total gain of all requests, each from its better source, is highest; it may be 0. Tokens that came while
the model did not run must be read first: that cost is spread over the steps for which the model is expected to be used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_instant import Draft, DraftCost, DraftRequest
from vllm_instant.interfaces.drafter import DraftAssignment, HybridDrafter
from vllm_instant.interfaces.speculation import UNAFFORDABLE
from vllm_instant.scheduling.request_registry import prompt_group
from vllm_instant.speculation.draft_plan import trim_drafts
from vllm_instant_plugins.acceptance import REQUEST_PRIOR, AcceptanceModel
from vllm_instant_plugins.hybrid.draft_steps import CatchUp, Lookups, best_draft_steps, rows_cost
from vllm_instant_plugins.hybrid.lookup_miss_streaks import MIN_GAIN, LookupMissStreaks
from vllm_instant_plugins.suffix.calibration import count_accepted
from vllm_instant_plugins.suffix.drafter import SuffixDrafter

Array = npt.NDArray[np.float64]

PROBE_SHARE = 0.005
"""Share of the tokens that is spent on testing whether an unused draft model has become better."""
MIN_STEPS_BETWEEN_PROBES = 50
PROBE_TOKENS = 3
"""Draft tokens of a probe: a first token alone does not show the value of the tokens behind it."""
MEMORY_PER_DRAFT, MEMORY_PER_STEP = 0.99, 0.998
"""Factors of the calibration record, per compared draft and per step."""
PRIOR_TOKENS = 10.0
"""Weight of the assumption that expectations are accurate, in accepted tokens."""


class _ModelDraft(NamedTuple):
    """The draft model's newest draft of a request."""

    position: int
    """Tokens of the request before it."""
    token_ids: npt.NDArray[np.int32]
    survival: Array
    """Expected survival of each token."""


class LookupHybridDrafter(HybridDrafter):
    """Chooses between a lookup and a draft model.

    Args:
        lookup: the lookup.
        max_draft_tokens: limit of a request's draft tokens in one step.

    """

    def __init__(self, lookup: SuffixDrafter, max_draft_tokens: int) -> None:
        self._lookup = lookup
        # Its sources are compared within a request, whose own text counts.
        self.model = AcceptanceModel(max_draft_tokens, alike_prior=REQUEST_PRIOR)
        """Acceptance of the draft model's tokens."""
        self._max_draft_tokens = max_draft_tokens
        self._indices: dict[str, int] = {}
        self._free_indices: list[int] = []
        self._drafted: dict[str, _ModelDraft] = {}
        self._survival: dict[str, Array] = {}
        """Expected survival of each draft token, of the requests that the draft model serves."""
        self._expected = self._accepted = PRIOR_TOKENS
        """Accepted tokens that were expected and observed: whichever source looks best was often only lucky."""
        self._lengths: dict[str, int] = {}
        """Tokens of each request at its last assignment."""
        self._unused_steps = 0
        self._miss_streaks = LookupMissStreaks()

    def propose(self, requests: Sequence[DraftRequest]) -> Sequence[Draft]:
        """The lookup's drafts alone."""
        return self._lookup.propose(requests)

    def assign(self, requests: Sequence[DraftRequest], draft_cost: DraftCost) -> Sequence[DraftAssignment]:
        """The source of each request's draft, and the draft model's number of tokens."""
        indices = self._learn(requests)
        drafts = self._lookup.propose(requests)
        draft_cost = _with_curve(draft_cost)
        limits = np.array([request.max_draft_tokens for request in requests])
        pinned = np.array([request.is_fixed for request in requests])
        # A client that fixed its draft length is served at any cost.
        row_cost = np.where(pinned, 0.0, _marginal_row_cost(draft_cost, len(requests), self._max_draft_tokens))
        lookups, value, steps = self._value_lookups(requests, drafts, draft_cost, row_cost, pinned)

        survival = self.model.survival(indices)
        token_values = survival * min(1.0, self._accepted / self._expected) * value
        token_values[np.arange(self._max_draft_tokens) >= limits[:, None]] = 0.0
        uncached_tokens = np.array([request.uncached_tokens for request in requests])
        catch_up = CatchUp(uncached_tokens, steps)
        best, use_model, model_tokens, total = best_draft_steps(
            token_values, lookups, catch_up, row_cost, pinned, draft_cost
        )
        lookup_tokens = lookups.rows
        if total <= 0 and draft_cost.verify_cost_curve and not pinned.any():
            best, use_model, lookup_tokens = 0, np.zeros_like(use_model), np.zeros_like(lookup_tokens)
        model_tokens = np.minimum(model_tokens, best)
        self._unused_steps = 0 if best else self._unused_steps + 1
        if best == 0 and self._probe(lookups.gain, token_values, uncached_tokens, draft_cost, use_model):
            model_tokens = np.minimum(limits, PROBE_TOKENS)
        self.model.fade(indices[~use_model])
        self._survival = {requests[row].request_id: survival[row] for row in np.flatnonzero(use_model)}
        return [
            DraftAssignment(draft.token_ids[:length], int(num_draft_tokens) if by_model else 0)
            for draft, length, by_model, num_draft_tokens in zip(
                drafts, lookup_tokens, use_model, model_tokens, strict=True
            )
        ]

    def _value_lookups(
        self,
        requests: Sequence[DraftRequest],
        drafts: Sequence[Draft],
        draft_cost: DraftCost,
        row_cost: Array,
        pinned: npt.NDArray[np.bool_],
    ) -> tuple[Lookups, Array, Array]:
        """The trimmed lookups, the value of each draft position, and the expected steps of each miss streak."""
        kept = [len(tokens) for tokens in trim_drafts(drafts, draft_cost, pinned.tolist())]
        _, gain = _expected_tokens(drafts, kept, row_cost)
        value, steps = self._miss_streaks.values(requests, gain, draft_cost, self._max_draft_tokens)
        return Lookups(*_expected_tokens(drafts, kept, row_cost, value), np.array(kept)), value, steps

    def _probe(
        self,
        lookup_gain: Array,
        token_values: Array,
        uncached_tokens: npt.NDArray[np.intp],
        draft_cost: DraftCost,
        use_model: npt.NDArray[np.bool_],
    ) -> bool:
        """Whether an unused model is tried for the request with the worst lookup; then sets it in ``use_model``."""
        probed = int(lookup_gain.argmin())
        if lookup_gain[probed] >= MIN_GAIN:
            return False
        missed = uncached_tokens[probed]
        expected = float(token_values[probed, :PROBE_TOKENS].sum())
        expected -= float(draft_cost.catch_up_per_token * missed + (draft_cost.catch_up_fixed if missed else 0.0))
        cost = (
            draft_cost.draft_fixed
            + PROBE_TOKENS * draft_cost.per_draft_step
            + float(rows_cost(draft_cost, np.array([PROBE_TOKENS]))[0])
        )
        # loss / interval <= PROBE_SHARE * tokens per step
        loss = max(0.0, cost - expected)
        if self._unused_steps < max(MIN_STEPS_BETWEEN_PROBES, loss / (PROBE_SHARE * len(lookup_gain))):
            return False
        self._unused_steps = 0
        use_model[probed] = True
        return True

    def on_model_drafts(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """Remember the model's drafts, to compare them with the tokens that are sampled."""
        for request_id, draft in drafts.items():
            if draft:
                survival = self._survival.get(request_id, np.zeros(0))[: len(draft)]
                self._drafted[request_id] = _ModelDraft(
                    self._lengths[request_id], np.asarray(draft, np.int32), survival
                )

    def _learn(self, requests: Sequence[DraftRequest]) -> npt.NDArray[np.intp]:
        """Compare the new tokens with the model's drafts; returns the indices of the requests."""
        indices, rows, compared, accepted = [], [], [], []
        self._expected = MEMORY_PER_STEP * self._expected + (1 - MEMORY_PER_STEP) * PRIOR_TOKENS
        self._accepted = MEMORY_PER_STEP * self._accepted + (1 - MEMORY_PER_STEP) * PRIOR_TOKENS
        for request in requests:
            index = self._index(request)
            indices.append(index)
            self._lengths[request.request_id] = len(request.token_ids)
            draft = self._drafted.pop(request.request_id, None)
            if draft is None:
                continue
            new_tokens = request.token_ids[draft.position :]
            num_compared, num_accepted = count_accepted(draft.token_ids.tolist(), new_tokens.tolist())
            if num_compared:
                rows.append(index)
                compared.append(num_compared)
                accepted.append(num_accepted)
                # A preempted request loses its draft: the tokens after that say nothing about the rest of it.
                known = len(new_tokens) if num_accepted == len(new_tokens) else len(draft.token_ids)
                self._expected = MEMORY_PER_DRAFT * self._expected + float(draft.survival[:known].sum())
                self._accepted = MEMORY_PER_DRAFT * self._accepted + num_accepted
        if rows:
            self.model.observe(rows, compared, accepted)
        return np.array(indices, np.intp)

    def _index(self, request: DraftRequest) -> int:
        index = self._indices.get(request.request_id)
        if index is None:
            index = self._free_indices.pop() if self._free_indices else len(self._indices)
            self._indices[request.request_id] = index
            self.model.enter(index, 0, prompt_group(request.token_ids[: request.num_prompt_tokens]))
        return index

    def forget(self, request_id: str) -> None:
        """Drop what was known of a request that has ended."""
        self._lookup.forget(request_id)
        index = self._indices.pop(request_id, None)
        if index is not None:
            self._free_indices.append(index)
        self._drafted.pop(request_id, None)
        self._lengths.pop(request_id, None)
        self._miss_streaks.forget(request_id)


def _with_curve(draft_cost: DraftCost) -> DraftCost:
    """The cost with a verification curve, also where only the rough cost per token is known."""
    if draft_cost.verify_cost_curve or not (draft_cost.per_token or draft_cost.verify_fixed):
        return draft_cost
    return replace(
        draft_cost,
        verify_cost_curve=[(count, count * draft_cost.per_token + draft_cost.verify_fixed) for count in (1, 1024)],
    )


def _marginal_row_cost(draft_cost: DraftCost, num_requests: int, max_draft_tokens: int) -> float:
    """Cost of one more draft token where every request has one: the first ones also pay for verification as such."""
    few = float(num_requests)
    affordable = max((count for count, cost in draft_cost.verify_cost_curve if cost < UNAFFORDABLE), default=0)
    many = min(few * (1.0 + max_draft_tokens / 2), affordable)
    if many <= few:
        return draft_cost.per_token
    cost_of_few, cost_of_many = rows_cost(draft_cost, np.array([few, many]))
    return max(0.0, float(cost_of_many - cost_of_few) / (many - few))


def _expected_tokens(
    drafts: Sequence[Draft], kept: Sequence[int], row_cost: Array, value: Array | None = None
) -> tuple[Array, Array]:
    """Expected accepted tokens of each trimmed lookup, gross and net of verification cost."""
    gross, net = np.zeros(len(drafts)), np.zeros(len(drafts))
    for row, (draft, length) in enumerate(zip(drafts, kept, strict=True)):
        if length:
            survival = np.cumprod(np.asarray(draft.confidence[:length], float))
            gross[row] = survival.sum() if value is None else survival @ value[row, :length]
            net[row] = max(0.0, gross[row] - length * row_cost[row])
    return gross, net
