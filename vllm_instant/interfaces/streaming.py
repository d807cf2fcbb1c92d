"""The ``streaming`` slot: prompts that are still arriving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy the engine is with requests that somebody waits for, as far as this API server knows."""

    running: int
    """Requests in the engine, waiting ones included; what is read ahead of a prompt's end is not counted."""
    max_running: int
    """Most requests that can run at once."""
    ahead: int = 0
    """Requests in the engine that nobody waits for: chunks that are read ahead, and answers begun early."""


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How far a prompt that is still arriving has been read."""

    settled_tokens: int
    """Tokens so far that no later text can change: the beginning of the prompt."""
    cached_tokens: int
    """Those of them whose keys and values were computed ahead."""
    block_size: int
    """Tokens of a KV block."""
    is_held: bool = False
    """Whether any number of tokens is kept (see ``Holds``); otherwise only whole blocks are."""


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """One chunk that was read ahead."""

    tokens: int
    seconds: float
    """From asking the engine to its answer."""
    load: EngineLoad
    """As it was when the engine was asked."""


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """What clients with prompts that are still arriving may take."""

    sessions: int = 256
    """Open at once in one API server."""
    sessions_per_client: int = 16
    """Clients are told apart by their credentials, and by address where they have none."""
    idle_seconds: float = 300.0
    """Without an event from the client, after which its session is closed."""
    text_characters: int = 1_000_000
    """Of one prompt."""
    prefills_in_flight: int = 1
    """Chunks of all sessions that the engine reads at once."""
    token_seconds: float = 60.0
    """How long a session token can be used to open sessions."""
    demo_page: bool = False
    """Whether a page to try it is served."""


@dataclass(frozen=True, kw_only=True)
class Holds:
    """Which sessions keep their KV blocks between chunks. All others lose what does not fill a block.

    Whenever the engine is short of blocks, held ones are given back before a request waits for them.
    """

    sessions: int
    """Most at once, in each engine."""
    tokens: int
    """Most of one prompt; what lies behind is not held."""
    cache_share: float
    """Most of all KV blocks, for all sessions together."""
    idle_seconds: float
    """Without new text, after which a session holds nothing any more."""


@runtime_checkable
class StreamingPrefill(Protocol):
    """Decides what is read of prompts that are still arriving, and when. Runs in the API server.

    Sessions, routes and the way into vLLM are not the plugin's: ``vllm_instant.streaming`` has them. A plugin that
    fails is not asked again; prompts are then read when they are complete.
    """

    def next_chunk(self, progress: PrefillProgress, load: EngineLoad) -> int:
        """How many tokens of the prompt shall be cached next, at most ``settled_tokens``.

        No more than ``cached_tokens`` means: nothing now. Asked again a little later, and when more text is there.
        """
        ...

    def observe(self, outcome: PrefillOutcome) -> None:
        """Learn what a chunk took. Optional."""
        return None

    def early_after(self) -> float | None:
        """Seconds without new text after which ``starts_early`` is asked; None: never. Optional."""
        return None

    def starts_early(self, load: EngineLoad) -> bool:
        """Whether to begin the answer before the client commits, as if the prompt ended here. Optional.

        It is thrown away if the prompt does not end here.
        """
        return False

    def max_early_seconds(self) -> float:
        """How long such an answer goes on when nobody commits. Optional."""
        return 1.0

    def holds(self) -> Holds | None:
        """Whether sessions keep their KV blocks between chunks; asked once. Optional."""
        return None

    def limits(self) -> SessionLimits:
        """What clients may take; asked once. Optional."""
        return SessionLimits()
