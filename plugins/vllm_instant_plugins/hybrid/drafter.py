"""The ``hybrid`` drafter: lookup where it is sure, the draft model where it brings more, neither where neither pays.

Running the draft model costs every request of the step, so that the question is asked once for all: with how many
passes of it is what all requests gain together, each from its better source, worth the most? None is an answer. What
came while it did not run it has to read first: that is paid off over the steps for which it is expected to be needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vllm_instant import Draft, DraftCost, DraftRequest
from vllm_instant.interfaces.drafter import DraftAssignment, HybridDrafter
from vllm_instant.scheduling.request_registry import prompt_group
from vllm_instant.speculation.draft_plan import trim_drafts
from vllm_instant_plugins.goodput.acceptance import AcceptanceModel
from vllm_instant_plugins.goodput.plan_kernels import UNAFFORDABLE
from vllm_instant_plugins.hybrid.draft_steps import Lookups, Reading, best_passes, rows_cost
from vllm_instant_plugins.hybrid.lookup_miss_streaks import MIN_GAIN, LookupMissStreaks
from vllm_instant_plugins.suffix.calibration import count_accepted
from vllm_instant_plugins.suffix.drafter import SuffixDrafter

Array = npt.NDArray[np.float64]

PROBE_SHARE = 0.005
"""Share of the tokens that is spent on looking whether an unused draft model has become better."""
MIN_STEPS_BETWEEN_PROBES = 50
PROBE_TOKENS = 3
"""Drafted then: a first token alone does not show what those behind it are worth."""
FORGETTING, RELAXING = 0.99, 0.998
"""By draft, and by step, of how far expectations came true."""
DOUBT = 10.0
"""Accepted tokens that the belief in one's own expectations is worth."""


class LookupHybridDrafter(HybridDrafter):
    """Chooses between a lookup and a draft model.

    Args:
        lookup: the lookup.
        max_draft_tokens: most draft tokens a request can get.

    """

    def __init__(self, lookup: SuffixDrafter, max_draft_tokens: int) -> None:
        self._lookup = lookup
        self.model = AcceptanceModel(max_draft_tokens)
        """What became of the draft model's tokens."""
        self._most = max_draft_tokens
        self._indices: dict[str, int] = {}
        self._free: list[int] = []
        self._drafted: dict[str, tuple[int, npt.NDArray[np.int32], Array]] = {}
        """The draft model's newest draft by request, how many tokens there were before it, and ``_expected`` of it."""
        self._expected: dict[str, Array] = {}
        """Chances that each draft token and all before it are accepted, of the requests that get the model's."""
        self._hoped = self._got = DOUBT
        """Accepted tokens that were expected and that came: who is chosen for his estimate often was only lucky."""
        self._lengths: dict[str, int] = {}
        """Tokens of each request when its share was last asked for."""
        self._unused_steps = 0
        self._silences = LookupMissStreaks()

    def propose(self, requests: Sequence[DraftRequest]) -> Sequence[Draft]:
        """The lookup's drafts alone."""
        return self._lookup.propose(requests)

    def assign(self, requests: Sequence[DraftRequest], draft_cost: DraftCost) -> Sequence[DraftAssignment]:
        """The source of each request's draft, and how far the draft model drafts."""
        indices = self._learn(requests)
        lookups = self._lookup.propose(requests)
        draft_cost = _whole(draft_cost)
        most = np.array([request.max_draft_tokens for request in requests])
        pinned = np.array([request.is_fixed for request in requests])
        kept = [len(tokens) for tokens in trim_drafts(lookups, draft_cost, pinned.tolist())]
        # A client that asked for its length is served whatever it costs.
        row_price = np.where(pinned, 0.0, _further_row(draft_cost, len(requests), self._most))
        own_value, own_gain = _worth(lookups, kept, row_price)
        value, steps = self._silences.values(requests, own_gain, draft_cost, self._most)
        own_value, own_gain = _worth(lookups, kept, row_price, value)
        own_worth = np.array(kept)

        reach = self.model.reach(indices)
        reached = reach * min(1.0, self._got / self._hoped) * value
        reached[np.arange(self._most) >= most[:, None]] = 0.0
        missed = np.array([request.uncached_tokens for request in requests])
        best, use_model, worth, together = best_passes(
            reached, Lookups(own_value, own_gain, own_worth), Reading(missed, steps), row_price, pinned, draft_cost
        )
        if together <= 0 and draft_cost.verify_cost_curve and not pinned.any():
            best, use_model, own_worth = 0, np.zeros_like(use_model), np.zeros_like(own_worth)
        worth = np.minimum(worth, best)
        self._unused_steps = 0 if best else self._unused_steps + 1
        probed = int(own_gain.argmin())
        hoped = float(reached[probed, :PROBE_TOKENS].sum())
        catching_up = draft_cost.catch_up_per_token * missed[probed] + (
            draft_cost.catch_up_fixed if missed[probed] else 0.0
        )
        hoped -= float(catching_up)
        if best == 0 and own_gain[probed] < MIN_GAIN and self._probe_is_due(len(requests), draft_cost, hoped):
            self._unused_steps = 0
            use_model[probed] = True
            worth = np.minimum(most, PROBE_TOKENS)
        self.model.fade(indices[~use_model])
        self._expected = {requests[row].request_id: reach[row] for row in np.flatnonzero(use_model)}
        return [
            DraftAssignment(lookup.token_ids[:length], int(num_draft_tokens) if model else 0)
            for lookup, length, model, num_draft_tokens in zip(lookups, own_worth, use_model, worth, strict=True)
        ]

    def _probe_is_due(self, requests: int, draft_cost: DraftCost, hoped: float) -> bool:
        costs = (
            draft_cost.draft_fixed
            + PROBE_TOKENS * draft_cost.per_draft_step
            + float(rows_cost(draft_cost, np.array([PROBE_TOKENS]))[0])
        )
        loss = max(0.0, costs - hoped)
        return self._unused_steps >= max(MIN_STEPS_BETWEEN_PROBES, loss / (PROBE_SHARE * requests))

    def on_model_drafts(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """Remember what to compare with the tokens that come."""
        for request_id, draft in drafts.items():
            if draft:
                expected = self._expected.get(request_id, np.zeros(0))[: len(draft)]
                self._drafted[request_id] = (self._lengths[request_id], np.asarray(draft, np.int32), expected)

    def _learn(self, requests: Sequence[DraftRequest]) -> npt.NDArray[np.intp]:
        """Compare what came with what the model drafted; the indices of the requests."""
        indices, compared, kept, rows = [], [], [], []
        self._hoped = RELAXING * self._hoped + (1 - RELAXING) * DOUBT
        self._got = RELAXING * self._got + (1 - RELAXING) * DOUBT
        for request in requests:
            request_id = request.request_id
            index = self._indices.get(request_id)
            if index is None:
                index = self._indices[request_id] = self._free.pop() if self._free else len(self._indices)
                self.model.enter(index, 0, prompt_group(request.token_ids[: request.num_prompt_tokens]))
            indices.append(index)
            self._lengths[request_id] = len(request.token_ids)
            drafted = self._drafted.pop(request_id, None)
            if drafted is not None:
                before, draft, expected = drafted
                came = request.token_ids[before:]
                tried, right = count_accepted(draft, came)
                if tried:
                    rows.append(index)
                    compared.append(tried)
                    kept.append(right)
                    # A request that is preempted loses its draft: what follows says nothing of the rest of it.
                    known = len(came) if right == len(came) else len(draft)
                    self._hoped = FORGETTING * self._hoped + float(expected[:known].sum())
                    self._got = FORGETTING * self._got + right
        if rows:
            self.model.observe(rows, compared, kept)
        return np.array(indices, np.intp)

    def forget(self, request_id: str) -> None:
        """The request ended."""
        self._lookup.forget(request_id)
        index = self._indices.pop(request_id, None)
        if index is not None:
            self._free.append(index)
        self._drafted.pop(request_id, None)
        self._lengths.pop(request_id, None)
        self._silences.forget(request_id)


def _whole(draft_cost: DraftCost) -> DraftCost:
    """The price with what batches cost, also where only the rough price is known."""
    if draft_cost.verify_cost_curve or not (draft_cost.per_token or draft_cost.verify_fixed):
        return draft_cost
    return replace(
        draft_cost,
        verify_cost_curve=[(count, count * draft_cost.per_token + draft_cost.verify_fixed) for count in (1, 1024)],
    )


def _further_row(draft_cost: DraftCost, requests: int, most: int) -> float:
    """What one draft token more costs where every request has one: the first ones also pay for verifying at all."""
    few, affordable = (
        float(requests),
        max((count for count, cost in draft_cost.verify_cost_curve if cost < UNAFFORDABLE), default=0),
    )
    many = min(few * (1.0 + most / 2), affordable)
    if many <= few:
        return draft_cost.per_token
    cost_of_few, cost_of_many = rows_cost(draft_cost, np.array([few, many]))
    return max(0.0, float(cost_of_many - cost_of_few) / (many - few))


def _worth(
    lookups: Sequence[Draft], kept: Sequence[int], row_price: Array, value: Array | None = None
) -> tuple[Array, Array]:
    """What that which is kept of each lookup is worth, and what of it is gained; accepted tokens."""
    worth, gain = np.zeros(len(lookups)), np.zeros(len(lookups))
    for row, (lookup, length) in enumerate(zip(lookups, kept, strict=True)):
        if length:
            reach = np.cumprod(np.asarray(lookup.confidence[:length], float))
            worth[row] = reach.sum() if value is None else reach @ value[row, :length]
            gain[row] = max(0.0, worth[row] - length * row_price[row])
    return worth, gain
