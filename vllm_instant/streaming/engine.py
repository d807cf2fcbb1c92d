"""The interface of sessions to an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_instant.interfaces.streaming import EngineLoad, PinLimits

ChatRequest = Mapping[str, Any]
"""The body of a request to ``/v1/chat/completions``."""


class RequestError(Exception):
    """A request that cannot be served, with a message for the client and an HTTP status as ``code``."""

    def __init__(self, message: str, code: int = 400) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Prompt:
    """The tokenized prompt of a request."""

    token_ids: list[int]
    """Token ids of the prompt; empty if it cannot be prefilled in parts."""
    handle: Any = None
    """Data of the engine."""


class StreamingEngine(Protocol):
    """An engine. A cancelled call is aborted in the engine too.

    ``affinity`` is the session's number: requests of one session go to the data-parallel rank that caches its prompt.
    ``session`` is the session's name if its prefix is pinned.
    """

    @property
    def block_size(self) -> int:
        """Tokens per KV block."""
        ...

    def load(self) -> EngineLoad:
        """Return the current load."""
        ...

    async def render(self, request: ChatRequest) -> Prompt:
        """Return the prompt of a chat request, with the chat template applied; raises ``RequestError``."""
        ...

    async def prefill(self, prompt: Prompt, length: int, affinity: int, session: str | None = None) -> None:
        """Prefill the first ``length`` tokens of a prompt."""
        ...

    def answer(
        self, request: ChatRequest, affinity: int, commit: CommitFlag | None = None, session: str | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of the answer in OpenAI's format; raises ``RequestError``.

        ``commit`` belongs to a speculative answer, whose prompt may not be committed yet.
        """
        ...

    async def pin(self, name: str, limits: PinLimits) -> str | None:
        """Pin the KV blocks of a session between its requests; return why that is not possible, or None."""
        ...

    async def unpin(self, name: str) -> None:
        """Unpin the KV blocks of a session."""
        ...


@dataclass(eq=False)
class CommitFlag:
    """Whether the prompt of a speculative answer has been committed since the answer started."""

    committed: bool = False
