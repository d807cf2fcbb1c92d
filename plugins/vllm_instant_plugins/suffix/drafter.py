"""The ``suffix`` drafter: the tokens that followed earlier occurrences of the newest tokens.

Two sources vote together: the request's own prompt and output, and the outputs of requests that have ended. Drafts and
their confidence follow SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975); here the confidence is calibrated by
acceptance, so that it can be compared with the cost of verification, and a copy is resumed behind an edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_instant import Draft, Drafter, DraftRequest
from vllm_instant_plugins.suffix.cache_salt_groups import CacheSaltGroups
from vllm_instant_plugins.suffix.calibration import ConfidenceCalibrator
from vllm_instant_plugins.suffix.index import TokenIndex
from vllm_instant_plugins.suffix.request_lookup import NOTHING_SHARED, RequestLookup


@dataclass(frozen=True, slots=True)
class _LiveRequest:
    lookup: RequestLookup
    num_prompt_tokens: int
    group: int
    """The history that it searches and adds to; -1 for its own tokens alone."""


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
        self._history = TokenIndex(history_tokens) if history_tokens else NOTHING_SHARED
        self._groups = CacheSaltGroups(share_across_cache_salts)
        self._calibrator = ConfidenceCalibrator()

    def warm_up(self) -> None:
        """Compile, or load what was compiled, before the first request."""
        # The tokens of requests are read-only, which Numba compiles separately; those of ended requests are not.
        for is_writeable in (False, True):
            tokens = np.array([1, 2, 3, 1, 2], np.int32)
            tokens.flags.writeable = is_writeable
            RequestLookup(64).propose(tokens, 1, ConfidenceCalibrator())
            TokenIndex(64).append(tokens)

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """One lookup per request."""
        return [self._propose(request) for request in requests]

    def _propose(self, request: DraftRequest) -> Draft:
        live = self._live.get(request.request_id)
        if live is None or len(live.lookup.tokens) > len(request.token_ids):
            group = self._groups.group(request.cache_salt)
            live = _LiveRequest(
                RequestLookup(self._max_model_len), request.num_prompt_tokens, -1 if group is None else group
            )
            self._live[request.request_id] = live
        return live.lookup.propose(
            request.token_ids, request.max_draft_tokens, self._calibrator, self._history, live.group
        )

    @property
    def num_history_tokens(self) -> int:
        """Number of tokens of ended requests that were kept so far, with one mark between two outputs."""
        return self._history.stop

    def history_bytes(self) -> int:
        """Memory of the history."""
        return sum(array.nbytes for array in self._history.arrays)

    def forget(self, request_id: str) -> None:
        """Move the output of a request that has ended into the history."""
        live = self._live.pop(request_id, None)
        if live is not None and live.group >= 0 and self._history is not NOTHING_SHARED:
            output = live.lookup.tokens[live.num_prompt_tokens :]
            if len(output):
                self._history.append(output, live.group)
                self._history.end_sequence(live.group)
