"""The lookup of one request, one compiled call per step: learn from the last draft, index new tokens, find, vote."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant import Draft
from vllm_instant_plugins.jit import compiled
from vllm_instant_plugins.suffix.calibration import ConfidenceCalibrator, learn, new_request_weights
from vllm_instant_plugins.suffix.index import MAX_CANDIDATES, MAX_MATCH, TokenIndex, Tokens, append, find
from vllm_instant_plugins.suffix.vote import RESUMED, RESUMED_LENGTH, RESUMED_MATCH_LENGTH, SHARED, resumed, vote

MIN_SURVIVAL = 0.003
"""A draft ends before the probability that all of it is accepted falls below this."""
LONG_COPY = 9
"""Match length, earlier draft tokens included, from which a copy is resumed after a wrong token."""
FORGET_AFTER = 32
"""Tokens after which a copy is no longer resumed."""

NOTHING_SHARED = TokenIndex(1)
"""For lookups in a request's own tokens alone."""

TOKENS, MATCHED, KIND, ORIGIN = range(4)
"""Rows of a draft's integers."""
RATE, CONFIDENCE = range(2)
"""Rows of a draft's real numbers: as calibrated for all requests, and for this one."""
COUNT, LEFT_AT, SINCE_LEFT = range(3)
"""A request's numbers: tokens of its last draft, where a long copy went wrong (-1 for none), and tokens since then."""


@compiled
def _step(
    own: Any,
    own_groups: Any,
    own_links: Any,
    own_heads: Any,
    own_stop: int,
    shared: Any,
    shared_groups: Any,
    shared_links: Any,
    shared_heads: Any,
    shared_stop: int,
    group: int,
    token_ids: Any,
    max_draft_tokens: int,
    integers: Any,
    reals: Any,
    numbers: Any,
    request_weights: Any,
    table: Any,
) -> int:
    """See ``RequestLookup.propose``; returns the number of draft tokens."""
    _learn(token_ids[own_stop:], integers, reals, numbers, request_weights, table)
    own_stop = append(own, own_groups, own_links, own_heads, own_stop, 0, token_ids[own_stop:], 0)
    newest = token_ids[max(0, len(token_ids) - MAX_MATCH) :]
    limit = 2 * MAX_CANDIDATES + 1
    places, lengths, sources = np.empty(limit, np.int64), np.empty(limit, np.int64), np.zeros(limit, np.int64)
    end = MAX_CANDIDATES
    found = find(own, own_groups, own_links, own_heads, own_stop, newest, 0, places[:end], lengths[:end])
    if group >= 0:
        end = found + MAX_CANDIDATES
        there = places[found:end], lengths[found:end]
        more = find(shared, shared_groups, shared_links, shared_heads, shared_stop, newest, group, there[0], there[1])
        sources[found : found + more] = SHARED
        found += more
    if numbers[LEFT_AT] >= 0:
        place, length = resumed(own, own_stop, newest, numbers[LEFT_AT])
        if place >= 0:
            places[found], sources[found] = place, RESUMED
            lengths[found] = length + RESUMED_MATCH_LENGTH if length else RESUMED_LENGTH
            found += 1
    count = 0
    if found:
        count = vote(
            own,
            own_stop,
            shared,
            shared_groups,
            shared_stop,
            group,
            places,
            lengths,
            sources,
            found,
            table[0],
            MIN_SURVIVAL,
            integers[TOKENS, :max_draft_tokens],
            reals[RATE],
            integers[MATCHED],
            integers[KIND],
            integers[ORIGIN],
        )
    factor = request_weights[1] / request_weights[0]
    for position in range(count):
        reals[CONFIDENCE, position] = min(1.0, reals[RATE, position] * factor)
    numbers[COUNT] = count
    return count


@compiled
def _learn(new_tokens: Any, integers: Any, reals: Any, numbers: Any, request_weights: Any, table: Any) -> None:
    """Compare the last draft with the tokens that came."""
    comparable, accepted = min(numbers[COUNT], len(new_tokens)), 0
    while accepted < comparable and integers[TOKENS, accepted] == new_tokens[accepted]:
        accepted += 1
    numbers[SINCE_LEFT] += len(new_tokens)
    if numbers[SINCE_LEFT] > FORGET_AFTER:
        numbers[LEFT_AT] = -1
    if comparable == 0:
        return
    learn(integers[KIND], reals[RATE], min(comparable, accepted + 1), accepted, table, request_weights)
    if accepted < comparable and integers[MATCHED, accepted] >= LONG_COPY and integers[ORIGIN, accepted] >= 0:
        numbers[LEFT_AT], numbers[SINCE_LEFT] = integers[ORIGIN, accepted], 0


class RequestLookup:
    """What is known of one request.

    Args:
        max_tokens: limit of its tokens.

    """

    def __init__(self, max_tokens: int) -> None:
        self._index = TokenIndex(max_tokens, growing=True)
        self._request_weights = new_request_weights()
        self._numbers: npt.NDArray[np.int64] = np.array([0, -1, 0])
        self._integers: npt.NDArray[np.int64] = np.empty((4, 0), np.int64)
        self._reals: npt.NDArray[np.float64] = np.empty((2, 0))

    @property
    def tokens(self) -> Tokens:
        """int32 ``[any]``: the tokens that were seen."""
        return self._index.tokens

    @property
    def kinds(self) -> list[int]:
        """What the confidence of each token of the last draft depends on; see ``vote.KINDS``."""
        kinds: list[int] = self._integers[KIND, : self._numbers[COUNT]].tolist()
        return kinds

    def propose(
        self,
        token_ids: Tokens,
        max_draft_tokens: int,
        calibrator: ConfidenceCalibrator,
        shared: TokenIndex = NOTHING_SHARED,
        group: int = -1,
    ) -> Draft:
        """The tokens that followed earlier occurrences of the newest ones.

        Args:
            token_ids: int32 ``[any]``, all tokens of the request so far.
            max_draft_tokens: limit of the draft.
            calibrator: learns from the last draft, and states the confidence of this one.
            shared: outputs of other requests.
            group: only those of this group count; -1 for none.

        """
        if max_draft_tokens > self._reals.shape[1]:
            more = ((0, 0), (0, max_draft_tokens - self._reals.shape[1]))
            self._integers, self._reals = np.pad(self._integers, more), np.pad(self._reals, more)
        index = self._index
        index.reserve(len(token_ids))
        count = _step(
            *index.arrays,
            index.stop,
            *shared.arrays,
            shared.stop,
            group,
            token_ids,
            max_draft_tokens,
            self._integers,
            self._reals,
            self._numbers,
            self._request_weights,
            calibrator.table,
        )
        index.stop = len(token_ids)
        if not count:
            return NO_DRAFT
        return Draft(self._integers[TOKENS, :count].tolist(), self._reals[CONFIDENCE, :count].tolist())


NO_DRAFT = Draft((), ())
