"""An answer that is started before its prompt is committed, in case the prompt is complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from vllm_instant.streaming.engine import ChatRequest, CommitFlag, StreamingEngine

MAX_BUFFERED_CHUNKS = 64
"""Maximum number of chunks that wait for the commit; after that the engine merges further output into one chunk."""


class SpeculativeAnswer:
    """The answer to a request before its commit; starts at once.

    Args:
        engine: Produces the answer.
        request: The request, with the text so far.
        affinity: The session's affinity.
        session: Name of the session, if its prefix is pinned.

    """

    def __init__(
        self, engine: StreamingEngine, request: ChatRequest, affinity: int, session: str | None = None
    ) -> None:
        self.request = request
        self._commit = CommitFlag()
        # The last entry is None, or the exception that ended the answer.
        self._chunks: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue(MAX_BUFFERED_CHUNKS)
        self._task = asyncio.get_running_loop().create_task(self._fill(engine, affinity, session))

    async def _fill(self, engine: StreamingEngine, affinity: int, session: str | None) -> None:
        try:
            async for chunk in engine.answer(self.request, affinity, self._commit, session):
                await self._chunks.put(chunk)
        except Exception as error:  # raised again in ``chunks``
            await self._chunks.put(error)
        else:
            await self._chunks.put(None)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Commit the prompt and yield all chunks of the answer. Raises the engine's exception, if any."""
        self._commit.committed = True
        try:
            while (chunk := await self._chunks.get()) is not None:
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
        finally:
            await self.discard()

    def stop(self) -> None:
        """Abort the answer."""
        self._task.cancel()

    async def discard(self) -> None:
        """Abort the answer, and return when the engine has released it."""
        self.stop()
        await asyncio.wait([self._task])
