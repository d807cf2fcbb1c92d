"""Mock servers for load tests, in threads of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from vllm_instant_loadtests.mock import MockPace, MockServer


@dataclass
class RunningMock:
    mock: MockServer
    url: str


@contextmanager
def serving(pace: MockPace, truth: Path | None = None) -> Iterator[RunningMock]:
    """A mock server while it serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started, loop = threading.Event(), asyncio.new_event_loop()
    found: list[MockServer] = []

    async def start() -> web.AppRunner:
        found.append(MockServer(pace, truth=truth))
        runner = web.AppRunner(found[0].app(), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield RunningMock(found[0], f"http://127.0.0.1:{port}")
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
