"""The ``hybrid`` drafter: lookup where it is sure, the draft model where it brings more, neither where neither pays.

Running the draft model costs every request of the step, so that the question is asked once for all: with how many
passes of it is what all requests gain together, each from its better source, worth the most? None is an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vllm_instant import Draft, DraftPrice, DraftRequest, Share, SharingDrafter, prompt_class
from vllm_instant_plugins.goodput.acceptance import AcceptanceModel
from vllm_instant_plugins.suffix.calibration import came_true
from vllm_instant_plugins.suffix.drafter import SuffixDrafter

Array = npt.NDArray[np.float64]

PROBE_SHARE = 0.005
"""Share of the tokens that is spent on looking whether an unused draft model has become better."""
LEAST_STEPS_BETWEEN_PROBES = 50


class HybridDrafter(SharingDrafter):
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
        self._drafted: dict[str, tuple[int, npt.NDArray[np.int32]]] = {}
        """The draft model's newest draft by request, and how many tokens there were before it."""
        self._lengths: dict[str, int] = {}
        """Tokens of each request when its share was last asked for."""
        self._unused_steps = 0

    def propose(self, requests: Sequence[DraftRequest]) -> Sequence[Draft]:
        """The lookup's drafts alone."""
        return self._lookup.propose(requests)

    def share(self, requests: Sequence[DraftRequest], price: DraftPrice) -> Sequence[Share]:
        """The source of each request's draft, and how far the draft model drafts."""
        indices = self._learn(requests)
        lookups = self._lookup.propose(requests)
        most = np.array([request.max_draft_tokens for request in requests])
        # A client that asked for its length is served whatever it costs.
        row_price = np.array([0.0 if request.is_pinned else price.row for request in requests])
        own_worth, own_gain = _worth(lookups, row_price)

        earned = np.maximum(self.model.reach(indices) - row_price[:, None], 0.0)
        earned[np.arange(self._most) >= most[:, None]] = 0.0
        # [requests, passes]: what each gains from the draft model by passes, from 0 on.
        by_passes = np.zeros((len(requests), self._most + 1))
        np.cumsum(earned, axis=1, out=by_passes[:, 1:])
        passes = np.arange(self._most + 1)
        together = np.maximum(by_passes, own_gain[:, None]).sum(0)
        together -= np.where(passes > 0, price.drafting + price.draft_pass * passes, 0.0)
        best = int(together.argmax())
        pinned = any(request.is_pinned for request in requests)
        if together[best] <= price.verifying and price.verifying > 0 and not pinned:
            best, own_worth = 0, np.zeros_like(own_worth)
        use_model = by_passes[:, best] > own_gain
        worth = np.minimum((earned > 0).sum(1), best)
        if best == 0:
            self._unused_steps += 1
            if self._probe_is_due(len(requests), price):
                self._unused_steps = 0
                use_model[int(own_gain.argmin())] = True
                worth[:] = 1
        else:
            self._unused_steps = 0
        self.model.fade(indices[~use_model])
        return [
            Share(lookup.token_ids[:length], int(model_length) if model else 0)
            for lookup, length, model, model_length in zip(lookups, own_worth, use_model, worth, strict=True)
        ]

    def _probe_is_due(self, requests: int, price: DraftPrice) -> bool:
        loss = price.drafting + price.draft_pass + price.row + price.verifying
        return self._unused_steps >= max(LEAST_STEPS_BETWEEN_PROBES, loss / (PROBE_SHARE * requests))

    def model_drafted(self, drafts: Mapping[str, Sequence[int]]) -> None:
        """Remember what to compare with the tokens that come."""
        for request_id, draft in drafts.items():
            if draft:
                self._drafted[request_id] = (self._lengths[request_id], np.asarray(draft, np.int32))

    def _learn(self, requests: Sequence[DraftRequest]) -> npt.NDArray[np.intp]:
        """Compare what came with what the model drafted; the indices of the requests."""
        indices, compared, kept, rows = [], [], [], []
        for request in requests:
            request_id = request.request_id
            index = self._indices.get(request_id)
            if index is None:
                index = self._indices[request_id] = self._free.pop() if self._free else len(self._indices)
                self.model.enter(index, 0, prompt_class(request.token_ids[: request.num_prompt_tokens]))
            indices.append(index)
            self._lengths[request_id] = len(request.token_ids)
            drafted = self._drafted.pop(request_id, None)
            if drafted is not None:
                before, draft = drafted
                tried, right = came_true(draft, request.token_ids[before:])
                if tried:
                    rows.append(index)
                    compared.append(tried)
                    kept.append(right)
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


def _worth(lookups: Sequence[Draft], row_price: Array) -> tuple[npt.NDArray[np.intp], Array]:
    """How much of each lookup earns its price, and what it gains; accepted tokens."""
    worth, gain = np.zeros(len(lookups), np.intp), np.zeros(len(lookups))
    for row, lookup in enumerate(lookups):
        if len(lookup.token_ids):
            reach = np.cumprod(np.asarray(lookup.confidence, float))
            worth[row] = np.count_nonzero(reach >= row_price[row])
            gain[row] = reach[: worth[row]].sum() - worth[row] * row_price[row]
    return worth, gain
