"""Coroutines in an event loop whose clock jumps to the next timer, so that no test waits and none depends on speed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from aiotools import VirtualClock

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in virtual time."""

    async def with_clock() -> T:
        with VirtualClock().patch_loop():
            return await main

    return asyncio.run(with_clock())


def clock() -> float:
    """Seconds of the running event loop."""
    return asyncio.get_running_loop().time()
