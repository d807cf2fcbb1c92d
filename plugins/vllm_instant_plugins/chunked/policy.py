"""How many tokens of a prompt that is still being typed are prefilled at a time."""

from __future__ import annotations

from collections import deque

import numpy as np

from vllm_instant.interfaces.streaming import (
    EngineLoad,
    PinLimits,
    PrefillOutcome,
    PrefillProgress,
    SessionLimits,
    StreamingPrefill,
)

NUM_REMEMBERED_CHUNKS = 32
"""Latest chunks whose time per token is kept."""
MIN_TOKENS = 16
"""Smallest chunk: every chunk costs an engine step."""
MIN_HELD_TOKENS = 2
"""Smallest chunk of a session that keeps its KV blocks, while no other request runs."""
FAST_QUANTILE = 0.25
"""Quantile of the measured times per token that is used; slower chunks mostly waited for other work first."""


class ChunkedPrefill(StreamingPrefill):
    """Prefills whole KV blocks, as many as fit into the time by which a step may be lengthened.

    While no request runs, the whole prompt so far is prefilled. Otherwise a chunk has the number of tokens that the
    engine prefills in ``stall_seconds``, by the measured time per token, and at least one block. While the engine has
    no free place, nothing is prefilled.

    Args:
        stall_seconds: maximum time by which a chunk may lengthen a step.
        early_seconds: pause in typing after which an answer is started while no other request runs; None for never.
        limits: limits of the clients.
        holds: which sessions keep their KV blocks between chunks; their chunks may have any number of tokens.

    """

    def __init__(
        self, stall_seconds: float, early_seconds: float | None, limits: SessionLimits, holds: PinLimits | None = None
    ) -> None:
        self._holds = holds
        self._stall_seconds = stall_seconds
        self._early_seconds = early_seconds
        self._limits = limits
        self._seconds_per_token: deque[float] = deque(maxlen=NUM_REMEMBERED_CHUNKS)

    def next_chunk(self, progress: PrefillProgress, load: EngineLoad) -> int:
        block = progress.block_size
        end = progress.stable_tokens // block * block
        start = progress.cached_tokens // block * block
        if progress.is_pinned:
            block, end, start = 1, progress.stable_tokens, progress.cached_tokens
        idle = load.num_running == 0
        if end - start < (MIN_HELD_TOKENS if progress.is_pinned and idle else MIN_TOKENS):
            return 0
        if idle:
            return end
        if load.num_running >= load.max_num_running:
            return 0
        min_tokens = -(-MIN_TOKENS // block) * block
        return min(end, start + max(min_tokens, self._tokens_in_stall() // block * block))

    def _tokens_in_stall(self) -> int:
        if not self._seconds_per_token:
            return 0
        seconds_per_token = float(np.quantile(self._seconds_per_token, FAST_QUANTILE))
        return int(self._stall_seconds / max(seconds_per_token, 1e-6))

    def observe(self, outcome: PrefillOutcome) -> None:
        self._seconds_per_token.append(outcome.seconds / outcome.num_tokens)

    def speculative_answer_delay(self) -> float | None:
        return self._early_seconds

    def starts_speculative_answer(self, load: EngineLoad) -> bool:
        # One early answer at a time: several could take the places of requests that arrive meanwhile.
        return load.num_running == load.num_speculative == 0

    def pin_limits(self) -> PinLimits | None:
        return self._holds

    def session_limits(self) -> SessionLimits:
        return self._limits
