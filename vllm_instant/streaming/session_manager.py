"""What the sessions of one API server share: the plugin, the engine, limits and numbers."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.interfaces.streaming import (
    EngineLoad,
    PinLimits,
    PrefillOutcome,
    PrefillProgress,
    SessionLimits,
    StreamingPrefill,
)
from vllm_instant.streaming.engine import StreamingEngine
from vllm_instant.streaming.metrics import StreamingMetrics

logger = logging.getLogger("vllm.instant")

HELD_TOKENS = 2
"""New text of so many tokens is looked at, where a session keeps any number of them."""


class RefusedError(Exception):
    """A session that a limit forbids; the message is for the client."""


class SessionManager:
    """Shared by the sessions of one server; made inside its event loop.

    Args:
        engine: the way to the engine.
        plugin: decides what is read ahead.
        numbers: the metrics.
        clock: seconds, never going back.

    """

    def __init__(
        self,
        engine: StreamingEngine,
        plugin: GuardedPlugin[StreamingPrefill],
        numbers: StreamingMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.numbers = numbers
        self.clock = clock
        self.limits = plugin.call("session_limits", lambda p: p.session_limits(), SessionLimits())
        self.holds: PinLimits | None = plugin.call("pin_limits", lambda p: p.pin_limits(), None)
        # Whoever asked first is first.
        self.turn = asyncio.Semaphore(self.limits.prefills_in_flight)
        self._plugin = plugin
        self._clients: Counter[str] = Counter()
        self._number = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._said: set[str] = set()

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return self._clients.total()

    def enter(self, client: str) -> int:
        """A client opens a session; returns its number. Raises RefusedError. Call ``leave`` at its end."""
        if self.sessions >= self.limits.max_sessions:
            self.numbers.refused.labels("sessions").inc()
            raise RefusedError(f"the server has {self.sessions} open sessions, as many as it may have")
        if self._clients[client] >= self.limits.max_sessions_per_client:
            self.numbers.refused.labels("sessions_per_client").inc()
            raise RefusedError(f"this client has {self._clients[client]} open sessions, as many as it may have")
        self._clients[client] += 1
        self._number += 1
        self.numbers.sessions.inc()
        return self._number

    def leave(self, client: str) -> None:
        """A session of the client has ended."""
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]
        self.numbers.sessions.dec()

    def new_name(self) -> str:
        """A name that nobody can guess."""
        return secrets.token_urlsafe(12)

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Let something finish that nobody waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def hold(self, name: str) -> bool:
        """Let a session keep its KV blocks between chunks, if the plugin wants that and there is room for one more."""
        if self.holds is None:
            return False
        try:
            unsupported_reason = await self.engine.hold(name, self.holds)
        except asyncio.CancelledError:
            self.keep(self.engine.unpin(name))  # the engine may have heard of it
            raise
        if unsupported_reason is None:
            self.numbers.held.inc()
        elif unsupported_reason not in self._said:
            self._said.add(unsupported_reason)
            logger.warning("A session does not keep its KV blocks between chunks: %s", unsupported_reason)
        return unsupported_reason is None

    async def unpin(self, name: str) -> None:
        """The session keeps none any more."""
        self.numbers.held.dec()
        await self.engine.unpin(name)

    # ------------------------------------------------------------------------------------------ the plugin

    def next_chunk(self, progress: PrefillProgress, idle: bool = False) -> int:
        """Tokens to have cached next, as the plugin says; with ``idle`` what it would say of an idle engine."""
        load = self.engine.load()
        if idle:
            load = EngineLoad(0, load.max_num_running)

        def ask(plugin: StreamingPrefill) -> int:
            length = plugin.next_chunk(progress, load)
            if type(length) is not int or length > progress.stable_tokens:
                raise ContractError(f"expected at most {progress.stable_tokens} tokens, found {length!r}")
            return length

        return self._plugin.call("next_chunk", ask, 0)

    def observe(self, outcome: PrefillOutcome) -> None:
        """A chunk was read."""
        self.numbers.prefills.inc()
        self.numbers.prefill_tokens.inc(outcome.num_tokens)
        self._plugin.call("observe", lambda p: p.observe(outcome), None)

    def speculative_answer_delay(self) -> float | None:
        """Seconds without new text after which an answer may be begun."""
        return self._plugin.call("speculative_answer_delay", lambda p: p.speculative_answer_delay(), None)

    def starts_speculative_answer(self) -> bool:
        """Whether to begin an answer now that nobody has asked for."""
        return bool(
            self._plugin.call(
                "starts_speculative_answer", lambda p: p.starts_speculative_answer(self.engine.load()), False
            )
        )

    def max_speculative_answer_seconds(self) -> float:
        """How long that goes on."""
        return self._plugin.call("max_speculative_answer_seconds", lambda p: p.max_speculative_answer_seconds(), 0.0)

    def worth_rendering(self, tokens: int, characters_a_token: float, is_pinned: bool = False) -> int:
        """Characters of new text for which the prompt is tokenised again.

        That takes time in proportion to the whole prompt. Waiting for a part of it bounds what is left to read at the
        end to that part, and the work to so many times the prompt.
        """
        least = HELD_TOKENS if is_pinned else max(self.engine.block_size // 4, 4)
        return int(characters_a_token * max(least, tokens // 64))
