"""The shared state of all sessions of one API server: plugin, engine, limits and metrics."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import fields
from typing import Any

from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.deployment.plain import finite, truth, whole
from vllm_instant.interfaces.streaming import (
    EngineLoad,
    PinLimits,
    PrefillOutcome,
    PrefillProgress,
    SessionLimits,
    StreamingPrefill,
)
from vllm_instant.streaming.budgets import ByteBudget, RenderingBudget
from vllm_instant.streaming.engine import StreamingEngine
from vllm_instant.streaming.metrics import StreamingMetrics

logger = logging.getLogger("vllm.instant")

MIN_PINNED_TOKENS = 2
"""Minimum number of new tokens for which a prompt with pinned blocks is tokenized again."""


def checked_limits(limits: Any) -> SessionLimits:
    """Return a plugin's limits with plain numbers; raises ContractError."""
    if not isinstance(limits, SessionLimits):
        raise ContractError(f"expected SessionLimits, found {type(limits).__name__}")
    values: dict[str, Any] = {}
    for name in (each.name for each in fields(SessionLimits)):
        value = getattr(limits, name)
        if name == "demo_page":
            values[name] = truth(value, name)
        elif name.endswith("_seconds"):
            values[name] = finite(value, name)
        else:
            values[name] = whole(value, name)
        if values[name] <= 0 and name != "demo_page":
            raise ContractError(f"{name} must be above 0, found {values[name]}")
    return SessionLimits(**values)


def checked_pins(limits: Any) -> PinLimits | None:
    """Return a plugin's limits of pinned blocks with plain numbers; raises ContractError."""
    if limits is None:
        return None
    if not isinstance(limits, PinLimits):
        raise ContractError(f"expected PinLimits or None, found {type(limits).__name__}")
    return PinLimits(
        max_sessions=whole(limits.max_sessions, "max_sessions"),
        max_tokens=whole(limits.max_tokens, "max_tokens"),
        max_cache_share=finite(limits.max_cache_share, "max_cache_share"),
        idle_seconds=finite(limits.idle_seconds, "idle_seconds"),
    )


class RefusedError(Exception):
    """A session that a limit forbids, with a message for the client."""


class SessionManager:
    """The sessions of one server; created inside its event loop.

    Args:
        engine: The engine.
        plugin: Decides what is prefilled.
        metrics: The Prometheus metrics.
        clock: Monotonic time in seconds.

    """

    def __init__(
        self,
        engine: StreamingEngine,
        plugin: GuardedPlugin[StreamingPrefill],
        metrics: StreamingMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.metrics = metrics
        self.clock = clock
        self.limits = plugin.call("session_limits", lambda p: checked_limits(p.session_limits()), SessionLimits())
        self.pin_limits: PinLimits | None = plugin.call("pin_limits", lambda p: checked_pins(p.pin_limits()), None)
        # asyncio.Semaphore is first come, first served.
        self.prefill_slots = asyncio.Semaphore(self.limits.prefills_in_flight)
        self._plugin = plugin
        self._clients: Counter[str] = Counter()
        self._client_of: dict[int, str] = {}
        self._bytes = ByteBudget(self.limits.max_client_bytes, self.limits.max_total_bytes)
        self._bytes_of: Counter[int] = Counter()
        self._rendering = RenderingBudget(clock)
        self._number = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._logged_reasons: set[str] = set()

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        return self._clients.total()

    def enter(self, client: str) -> int:
        """Open a session of a client and return its number; raises ``RefusedError``. Pair it with ``leave``."""
        if self.sessions >= self.limits.max_sessions:
            self.metrics.refused.labels("sessions").inc()
            raise RefusedError(f"the server's limit of {self.sessions} open sessions is reached")
        if self._clients[client] >= self.limits.max_sessions_per_client:
            self.metrics.refused.labels("sessions_per_client").inc()
            raise RefusedError(f"this client's limit of {self._clients[client]} open sessions is reached")
        self._clients[client] += 1
        self._number += 1
        self._client_of[self._number] = client
        self.metrics.sessions.inc()
        return self._number

    def leave(self, number: int) -> None:
        """A session ended."""
        self._bytes.resize(self._client_of[number], self._bytes_of.pop(number, 0), 0)
        client = self._client_of.pop(number)
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]
        self.metrics.sessions.dec()

    def resize(self, number: int, num_bytes: int) -> None:
        """The texts and the request of a session take ``num_bytes`` now; raises ``RefusedError``."""
        refusal = self._bytes.resize(self._client_of.get(number, ""), self._bytes_of[number], num_bytes)
        if refusal is not None:
            self.metrics.refused.labels("bytes").inc()
            raise RefusedError(refusal)
        self._bytes_of[number] = num_bytes

    async def may_render(self, number: int, characters: int) -> None:
        """Wait until a session's client may have this many characters tokenized."""
        await self._rendering.spend(self._client_of.get(number, ""), characters)

    def new_name(self) -> str:
        """Return an unguessable name."""
        return secrets.token_urlsafe(12)

    def run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine to its end without awaiting it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def pin(self, name: str) -> bool:
        """Pin a session's KV blocks between chunks; returns False if the plugin or a limit forbids it."""
        if self.pin_limits is None:
            return False
        try:
            unsupported_reason = await self.engine.pin(name, self.pin_limits)
        except asyncio.CancelledError:
            self.run_in_background(self.engine.unpin(name))  # the engine may have received the call
            raise
        if unsupported_reason is None:
            self.metrics.pinned.inc()
        elif unsupported_reason not in self._logged_reasons:
            self._logged_reasons.add(unsupported_reason)
            logger.warning("The KV blocks of a session are not pinned between chunks: %s", unsupported_reason)
        return unsupported_reason is None

    async def unpin(self, name: str) -> None:
        """Unpin a session's KV blocks."""
        self.metrics.pinned.dec()
        await self.engine.unpin(name)

    # ------------------------------------------------------------------------------------------ the plugin

    def next_chunk(self, progress: PrefillProgress, idle: bool = False) -> int:
        """Return the plugin's ``next_chunk``; with ``idle``, as if the engine were idle."""
        load = self.engine.load()
        if idle:
            load = EngineLoad(0, load.max_num_running)

        def ask(plugin: StreamingPrefill) -> int:
            length = whole(plugin.next_chunk(progress, load), "next_chunk")
            if length > progress.stable_tokens:
                raise ContractError(f"expected at most {progress.stable_tokens} tokens, found {length}")
            return length

        return self._plugin.call("next_chunk", ask, 0)

    def observe(self, outcome: PrefillOutcome) -> None:
        """Count a prefilled chunk and report it to the plugin."""
        self.metrics.prefills.inc()
        self.metrics.prefill_tokens.inc(outcome.num_tokens)
        self._plugin.call("observe", lambda p: p.observe(outcome), None)

    def speculative_answer_delay(self) -> float | None:
        """Return the seconds without new text after which a speculative answer may start; None for never."""

        def ask(plugin: StreamingPrefill) -> float | None:
            seconds = plugin.speculative_answer_delay()
            return None if seconds is None else max(0.0, finite(seconds, "speculative_answer_delay"))

        return self._plugin.call("speculative_answer_delay", ask, None)

    def starts_speculative_answer(self) -> bool:
        """Whether to start a speculative answer now."""
        load = self.engine.load()
        return self._plugin.call("starts_speculative_answer", lambda p: truth(p.starts_speculative_answer(load)), False)

    def max_speculative_answer_seconds(self) -> float:
        """Return the maximum duration of a speculative answer without a commit, in seconds."""
        return self._plugin.call(
            "max_speculative_answer_seconds", lambda p: max(0.0, finite(p.max_speculative_answer_seconds())), 0.0
        )

    def min_new_characters(self, tokens: int, characters_per_token: float, is_pinned: bool = False) -> int:
        """Return the number of new characters for which the prompt is tokenized again.

        Tokenization takes time in proportion to the whole prompt. With new text of at least 1/64 of the prompt, at most
        that part remains at the commit, and all tokenizations together take about 64 times as long as one.
        """
        min_tokens = MIN_PINNED_TOKENS if is_pinned else max(self.engine.block_size // 4, 4)
        return int(characters_per_token * max(min_tokens, tokens // 64))
