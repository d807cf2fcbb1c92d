"""What sessions need of an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_instant.interfaces.streaming import EngineLoad, PinLimits

ChatRequest = Mapping[str, Any]
"""The body of a request to ``/v1/chat/completions``."""


class RequestError(Exception):
    """A request that cannot be served; the message is for the client, ``code`` an HTTP status."""

    def __init__(self, message: str, code: int = 400) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Prompt:
    """A request as the engine would read it."""

    token_ids: list[int]
    """Empty where it cannot be read in parts."""
    handle: Any = None
    """The engine's own."""


class StreamingEngine(Protocol):
    """The way to an engine. Calls that are cancelled leave nothing behind in it.

    ``affinity`` is a number of the session: what one session asks for goes where its prompt is cached.
    """

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        ...

    def load(self) -> EngineLoad:
        """How busy it is now."""
        ...

    async def render(self, request: ChatRequest) -> Prompt:
        """The prompt of a chat request, chat template included; raises RequestError."""
        ...

    async def prefill(self, prompt: Prompt, length: int, affinity: int, hold: str | None = None) -> None:
        """Have the first ``length`` tokens of a prompt in the prefix cache; ``hold``: of the session of this name."""
        ...

    def answer(
        self, request: ChatRequest, affinity: int, early: Early | None = None, hold: str | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of the answer in OpenAI's chat-chunk format; raises RequestError. ``early``: not asked for yet."""
        ...

    async def hold(self, name: str, holds: PinLimits) -> str | None:
        """Let a session hold what its requests leave in the KV cache; returns why not, if not."""
        ...

    async def unpin(self, name: str) -> None:
        """The session holds nothing any more."""
        ...


@dataclass(eq=False)
class Early:
    """Whether an answer that was begun before its prompt was committed has been asked for since."""

    wanted: bool = False
