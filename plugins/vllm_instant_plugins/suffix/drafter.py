"""The ``suffix`` drafter: what followed the newest tokens before.

Two sources: the request's own prompt and output, and the outputs of requests that have ended. The one that promises
more accepted tokens is taken. Proposals and their confidence follow SuffixDecoding (Oliaro et al., 2024); here the
confidence is learned from what came true, so that it can be weighed against what verification costs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_instant import Draft, Drafter, DraftRequest
from vllm_instant_plugins.suffix.calibration import ConfidenceCalibrator, RequestCalibration, count_accepted
from vllm_instant_plugins.suffix.index import MAX_MATCH, NOTHING, Match, TokenIndex, Tokens

LEAST = 0.05
"""Proposals end before the chance that all of it is accepted falls below this."""
MAX_GROUPS = 4096
"""Tenants that are told apart at a time; who comes back after so many others starts with an empty history."""


@dataclass
class _Own:
    """One live request."""

    index: TokenIndex
    num_prompt_tokens: int
    group: int
    predictability: RequestCalibration = field(default_factory=RequestCalibration)
    found: Match = NOTHING
    from_history: bool = False


class SuffixDrafter(Drafter):
    """Lookup in a request's own tokens and in a shared history.

    Args:
        max_model_len: most tokens of a request.
        history_tokens: tokens of ended requests that are kept; 0 for none. The oldest make room.
        across_tenants: whether requests see the history of other cache salts.

    """

    def __init__(self, max_model_len: int, history_tokens: int, across_tenants: bool = False) -> None:
        self._most = max_model_len
        self._own: dict[str, _Own] = {}
        self._history = TokenIndex(history_tokens) if history_tokens else None
        self._across_tenants = across_tenants
        self._groups: OrderedDict[str, int] = OrderedDict()
        self._next_group = 0
        self._own_rates, self._history_rates = ConfidenceCalibrator(), ConfidenceCalibrator()

    def warm_up(self) -> None:
        """Compile, or load what was compiled, now: not while a request waits."""
        index = TokenIndex(64, growing=True)
        repeated = np.array([1, 2, 3, 1, 2], np.int32)
        index.append(repeated)
        index.propose(repeated[-2:], 1, self._own_rates.rates, LEAST)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """One lookup a request."""
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> Draft:
        own = self._own.get(request.request_id)
        if own is None or own.index.stop > len(request.token_ids):
            own = _Own(TokenIndex(self._most, growing=True), request.num_prompt_tokens, self._group(request.cache_salt))
            self._own[request.request_id] = own
        came = request.token_ids[own.index.stop :]
        if len(own.found.tokens):
            self._learn(own, came)
        own.index.append(came)
        newest = request.token_ids[-MAX_MATCH:]
        most = request.max_draft_tokens
        own.found = own.index.propose(newest, most, self._own_rates.rates, LEAST)
        own.from_history = False
        if self._history is not None and self._history.stop:
            found = self._history.propose(newest, most, self._history_rates.rates, LEAST, own.group)
            if _promise(found) > _promise(own.found):
                own.found, own.from_history = found, True
        confidence = np.minimum(own.found.confidence * own.predictability.factor, 1.0)
        return Draft(own.found.tokens.tolist(), confidence.tolist())

    def _learn(self, own: _Own, came: Tokens) -> None:
        compared, kept = count_accepted(own.found.tokens, came)
        if compared:
            rates = self._history_rates if own.from_history else self._own_rates
            rates.observe(own.found.matched[:compared], kept)
            own.predictability.observe(own.found, compared, kept)

    def _group(self, cache_salt: str) -> int:
        """The number of a tenant's history."""
        if self._across_tenants:
            return 0
        group = self._groups.get(cache_salt)
        if group is None:
            group = self._groups[cache_salt] = self._next_group
            self._next_group += 1
            if len(self._groups) > MAX_GROUPS:
                self._groups.popitem(last=False)
        else:
            self._groups.move_to_end(cache_salt)
        return group

    def forget(self, request_id: str) -> None:
        """What the request wrote becomes history."""
        own = self._own.pop(request_id, None)
        if own is not None and self._history is not None:
            written = own.index.tokens[own.num_prompt_tokens :]
            if len(written):
                self._history.append(written, own.group)
                self._history.end_sequence(own.group)


def _promise(found: Match) -> float:
    """Accepted tokens to expect of a proposal."""
    return float(found.confidence.cumprod().sum()) if len(found.tokens) else 0.0
