"""An answer that is begun before its prompt is committed, in case the prompt has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from vllm_instant.streaming.engine import ChatRequest, Early, StreamingEngine

CHUNKS_AHEAD = 64
"""Chunks that wait for a reader; behind them the engine's answer collects in bigger ones."""


class EarlyAnswer:
    """The answer to a request that nobody has sent yet; begins at once.

    Args:
        engine: where it comes from.
        request: what it answers.
        affinity: of the session.
        hold: name of the session, where it holds its prefix.

    """

    def __init__(self, engine: StreamingEngine, request: ChatRequest, affinity: int, hold: str | None = None) -> None:
        self.request = request
        self._early = Early()
        # The last entry is None or what went wrong.
        self._chunks: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue(CHUNKS_AHEAD)
        self._task = asyncio.get_running_loop().create_task(self._fill(engine, affinity, hold))

    async def _fill(self, engine: StreamingEngine, affinity: int, hold: str | None) -> None:
        try:
            async for chunk in engine.answer(self.request, affinity, self._early, hold):
                await self._chunks.put(chunk)
        except Exception as error:  # handed to whoever reads
            await self._chunks.put(error)
        else:
            await self._chunks.put(None)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The prompt was committed: the chunks so far, then the rest. Raises what the engine raised."""
        self._early.wanted = True
        try:
            while (chunk := await self._chunks.get()) is not None:
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
        finally:
            await self.discard()

    def stop(self) -> None:
        """Stop, whatever is left."""
        self._task.cancel()

    async def discard(self) -> None:
        """Stop, and return when the engine has let go."""
        self.stop()
        await asyncio.wait([self._task])
