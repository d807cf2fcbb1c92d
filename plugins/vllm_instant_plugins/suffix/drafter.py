"""The ``suffix`` drafter: the tokens that followed earlier occurrences of the newest tokens.

Two sources: the request's own prompt and output, and the outputs of requests that have ended. The source with more
expected accepted tokens is used. Drafts and their confidence follow SuffixDecoding (Oliaro et al. 2024, arXiv
2411.04975); here the confidence is calibrated by acceptance, so that it can be compared with the cost of verification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_instant import Draft, Drafter, DraftRequest
from vllm_instant_plugins.suffix.cache_salt_groups import CacheSaltGroups
from vllm_instant_plugins.suffix.calibration import ConfidenceCalibrator, RequestCalibration, count_accepted
from vllm_instant_plugins.suffix.index import MAX_MATCH, NO_MATCH, Match, TokenIndex, Tokens

MIN_SURVIVAL = 0.05
"""A draft ends before the probability that all of it is accepted falls below this."""


@dataclass
class _LiveRequest:
    index: TokenIndex
    num_prompt_tokens: int
    group: int | None
    """The history that it searches and adds to; None for its own tokens alone."""
    calibration: RequestCalibration = field(default_factory=RequestCalibration)
    match: Match = NO_MATCH
    from_history: bool = False


class SuffixDrafter(Drafter):
    """Lookup in a request's own tokens and in a shared history.

    Args:
        max_model_len: limit of a request's tokens.
        history_tokens: tokens of ended requests that are kept, the newest ones; 0 for none.
        share_across_cache_salts: whether all requests share one history; otherwise those with the same cache salt do.

    """

    def __init__(self, max_model_len: int, history_tokens: int, share_across_cache_salts: bool = False) -> None:
        self._max_model_len = max_model_len
        self._live: dict[str, _LiveRequest] = {}
        self._history = TokenIndex(history_tokens) if history_tokens else None
        self._groups = CacheSaltGroups(share_across_cache_salts)
        self._own_calibrator, self._history_calibrator = ConfidenceCalibrator(), ConfidenceCalibrator()

    def warm_up(self) -> None:
        """Compile, or load what was compiled, before the first request."""
        # The tokens of requests are read-only, which Numba compiles separately; those of ended requests are not.
        for is_writeable in (False, True):
            index = TokenIndex(64, growing=True)
            repeated = np.array([1, 2, 3, 1, 2], np.int32)
            repeated.flags.writeable = is_writeable
            index.append(repeated)
            match = index.propose(repeated[-2:], 1, self._own_calibrator.rates, MIN_SURVIVAL)
            ConfidenceCalibrator().observe(match.matched, 1)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """One lookup per request."""
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> Draft:
        live = self._live.get(request.request_id)
        if live is None or live.index.stop > len(request.token_ids):
            index = TokenIndex(self._max_model_len, growing=True)
            live = _LiveRequest(index, request.num_prompt_tokens, self._groups.group(request.cache_salt))
            self._live[request.request_id] = live
        new_tokens = request.token_ids[live.index.stop :]
        if len(live.match.tokens):
            self._learn(live, new_tokens)
        live.index.append(new_tokens)
        newest, limit = request.token_ids[-MAX_MATCH:], request.max_draft_tokens
        live.match = live.index.propose(newest, limit, self._own_calibrator.rates, MIN_SURVIVAL)
        live.from_history = False
        if self._history is not None and self._history.stop and live.group is not None:
            match = self._history.propose(newest, limit, self._history_calibrator.rates, MIN_SURVIVAL, live.group)
            if match.expected > live.match.expected:
                live.match, live.from_history = match, True
        if live.match is NO_MATCH:
            return Draft([], [])
        factor = live.calibration.factor
        confidence = [min(value * factor, 1.0) for value in live.match.confidence.tolist()]
        return Draft(live.match.tokens.tolist(), confidence)

    def _learn(self, live: _LiveRequest, new_tokens: Tokens) -> None:
        num_compared, num_accepted = count_accepted(live.match.tokens.tolist(), new_tokens.tolist())
        if num_compared:
            calibrator = self._history_calibrator if live.from_history else self._own_calibrator
            calibrator.observe(live.match.matched[:num_compared], num_accepted)
            live.calibration.observe(live.match, num_compared, num_accepted)

    def forget(self, request_id: str) -> None:
        """Move the output of a request that has ended into the history."""
        live = self._live.pop(request_id, None)
        if live is not None and live.group is not None and self._history is not None:
            output = live.index.tokens[live.num_prompt_tokens :]
            if len(output):
                self._history.append(output, live.group)
                self._history.end_sequence(live.group)
