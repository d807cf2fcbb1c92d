"""How much of a prompt that is still arriving is read ahead at a time."""

from __future__ import annotations

from collections import deque

import numpy as np

from vllm_instant import EngineLoad, Holds, PrefillOutcome, PrefillProgress, SessionLimits, StreamingPrefill

REMEMBERED = 32
"""Chunks whose time is kept."""
MIN_TOKENS = 16
"""Of a chunk: each costs an engine step."""
MIN_HELD_TOKENS = 2
"""Of a chunk that is held, while nobody else is served."""


class ChunkedPrefill(StreamingPrefill):
    """Whole KV blocks, as many as may wait in one step of those who are being answered.

    While nobody is, everything that is there is read at once. Otherwise a chunk lengthens a step of everybody, and gets
    as many tokens as the engine reads in ``stall_seconds``, by what chunks took lately (their fastest quarter: the
    others waited for something else first), yet at least one block. While no place is free, nothing is read.

    Args:
        stall_seconds: by which a chunk may lengthen a step.
        early_seconds: pause after which an answer is begun if nobody else is served; None: never.
        limits: what clients may take.
        holds: which sessions keep their KV blocks between chunks; for them any number of tokens is a chunk.

    """

    def __init__(
        self, stall_seconds: float, early_seconds: float | None, limits: SessionLimits, holds: Holds | None = None
    ) -> None:
        self._holds = holds
        self._stall = stall_seconds
        self._early = early_seconds
        self._limits = limits
        self._token_seconds: deque[float] = deque(maxlen=REMEMBERED)

    def next_chunk(self, progress: PrefillProgress, load: EngineLoad) -> int:
        block = progress.block_size
        whole = progress.settled_tokens // block * block
        start = progress.cached_tokens // block * block
        if progress.is_held:
            block, whole, start = 1, progress.settled_tokens, progress.cached_tokens
        alone = load.running == 0
        if whole - start < (MIN_HELD_TOKENS if progress.is_held and alone else MIN_TOKENS):
            return 0
        if alone:
            return whole
        if load.running >= load.max_running:
            return 0
        least = -(-MIN_TOKENS // block) * block
        return min(whole, start + max(least, self._tokens_in_stall() // block * block))

    def _tokens_in_stall(self) -> int:
        if not self._token_seconds:
            return 0
        return int(self._stall / max(float(np.quantile(self._token_seconds, 0.25)), 1e-6))

    def observe(self, outcome: PrefillOutcome) -> None:
        self._token_seconds.append(outcome.seconds / outcome.tokens)

    def early_after(self) -> float | None:
        return self._early

    def starts_early(self, load: EngineLoad) -> bool:
        # One at a time: together they could take the places of requests that come meanwhile.
        return load.running == load.ahead == 0

    def holds(self) -> Holds | None:
        return self._holds

    def limits(self) -> SessionLimits:
        return self._limits
