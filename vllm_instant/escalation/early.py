"""An answer that begins while it is still being decided who answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from vllm_instant.escalation.client import Message, Send


class EarlyAnswer:
    """One answer, whose messages are kept until they are wanted. Begins at once.

    Args:
        answer: Answers the request, given ASGI's ``send``.

    """

    def __init__(self, answer: Callable[[Send], Coroutine[Any, Any, None]]) -> None:
        self._kept: list[Message] = []
        self._send: Send | None = None
        self._task = asyncio.ensure_future(answer(self._take))

    async def _take(self, message: Message) -> None:
        if self._send is None:
            self._kept.append(message)
        else:
            await self._send(message)

    async def pass_to(self, send: Send) -> None:
        """Send the answer, from its beginning to its end."""
        while self._kept:  # others may come meanwhile
            await send(self._kept.pop(0))
        self._send = send
        await self._task

    async def drop(self) -> None:
        """End the answer; does nothing where it has ended."""
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        elif not self._task.cancelled():
            self._task.exception()  # so that asyncio does not report an error of an answer that is not wanted
