"""The ``streaming`` slot: prefill of prompts while they are still being typed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The requests in the engine, as far as this API server knows."""

    num_running: int
    """Number of requests in the engine, waiting ones included, without those of ``num_speculative``."""
    max_num_running: int
    """Maximum number of requests that can run at once."""
    num_speculative: int = 0
    """Number of speculative requests in the engine: chunks prefilled ahead of the commit and speculative answers."""


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """The prefilled part of a prompt that is still being typed."""

    stable_tokens: int
    """Number of leading tokens that later text cannot change."""
    cached_tokens: int
    """Number of stable tokens whose keys and values are computed."""
    block_size: int
    """Tokens per KV block."""
    is_pinned: bool = False
    """Whether the session's KV blocks are pinned (``PinLimits``), so that a chunk may end inside a block; otherwise
    only whole blocks are kept."""


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """One prefilled chunk."""

    num_tokens: int
    seconds: float
    """Time from the request to the engine until its answer."""
    load: EngineLoad
    """Load of the engine when the chunk was requested."""


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """Limits of the clients that send prompts while they are typed."""

    max_sessions: int = 256
    """Maximum number of open sessions per API server."""
    max_sessions_per_client: int = 16
    """Maximum number of open sessions per client; clients are distinguished by credential, and by address where they
    have none."""
    idle_seconds: float = 300.0
    """Seconds without an event from the client after which its session is closed."""
    max_text_characters: int = 1_000_000
    """Maximum length of one prompt in characters."""
    max_event_bytes: int = 4 << 20
    """Maximum size of one WebSocket frame or HTTP body in bytes."""
    max_client_bytes: int = 64 << 20
    """Maximum memory in bytes of the texts and requests of one client's sessions."""
    max_total_bytes: int = 256 << 20
    """Maximum memory in bytes of the texts and requests of all sessions per API server."""
    prefills_in_flight: int = 1
    """Maximum number of chunks, over all sessions, that the engine prefills at once."""
    token_seconds: float = 60.0
    """Maximum number of seconds for which a session token can open sessions."""
    demo_page: bool = False
    """Whether the demo page is served."""


@dataclass(frozen=True, kw_only=True)
class PinLimits:
    """Limits of the sessions that keep their KV blocks between chunks; other sessions keep only whole, cached blocks.

    When the engine is short of blocks, pinned blocks are released before a request has to wait for them.
    """

    max_sessions: int
    """Maximum number of sessions with pinned blocks per engine."""
    max_tokens: int
    """Maximum number of leading tokens per prompt whose blocks are pinned."""
    max_cache_share: float
    """Maximum fraction of all KV blocks that is pinned, over all sessions."""
    idle_seconds: float
    """Seconds without new text after which a session's blocks are unpinned."""


@runtime_checkable
class StreamingPrefill(Protocol):
    """Decides which part of an unfinished prompt is prefilled, and when. Runs in the API server.

    ``vllm_instant.streaming`` owns sessions, routes and requests to vLLM. A plugin that fails is not called again:
    prompts are then prefilled when they are committed.
    """

    def next_chunk(self, progress: PrefillProgress, load: EngineLoad) -> int:
        """Return the number of leading prompt tokens to have in the cache next, at most ``stable_tokens``.

        A number up to ``cached_tokens`` prefills nothing now. Called again shortly after, and when text arrives.
        """
        ...

    def observe(self, outcome: PrefillOutcome) -> None:
        """Learn the duration of a chunk. Optional."""
        return None

    def speculative_answer_delay(self) -> float | None:
        """Return the seconds without new text after which ``starts_speculative_answer`` is called; None for never.

        Optional.
        """
        return None

    def starts_speculative_answer(self, load: EngineLoad) -> bool:
        """Whether to start the answer before the client commits, as if the prompt ended here. Optional.

        The answer is discarded if the prompt continues.
        """
        return False

    def max_speculative_answer_seconds(self) -> float:
        """Return the seconds after which a speculative answer without a commit is aborted. Optional."""
        return 1.0

    def pin_limits(self) -> PinLimits | None:
        """Return the limits under which sessions pin their KV blocks; None for no pinning. Called once. Optional."""
        return None

    def session_limits(self) -> SessionLimits:
        """Return the limits of the clients. Called once. Optional."""
        return SessionLimits()
