"""A server that closes idle connections at the moment when their next request arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"


@asynccontextmanager
async def closing_server(answer: str = "{}", idle_seconds: float = 1.0) -> AsyncIterator[str]:
    """Yields its address; a request that comes ``idle_seconds`` after the one before it gets no answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        clock = asyncio.get_running_loop().time
        answered = clock()
        while head := await reader.read(65536):
            if clock() - answered >= idle_seconds:
                break
            if head.startswith((b"GET", b"POST")):
                writer.write((HEAD.format(len(answer)) + answer).encode())
                answered = clock()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
