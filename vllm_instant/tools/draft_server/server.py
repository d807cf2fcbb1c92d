"""The sockets of a draft server: tokens, TLS, metrics, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import ipaddress
import logging
import signal
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import prometheus_client
import websockets
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from vllm_instant.remote import protocol
from vllm_instant.tools.draft_server.service import DraftService

logger = logging.getLogger("vllm.instant.draft_server")


@dataclass(frozen=True)
class Endpoint:
    """Where a draft server listens, and the tokens that it takes."""

    host: str = "127.0.0.1"
    port: int = 8765
    tokens: Sequence[str] = ()
    """Tokens that open a connection; without one every connection is open."""
    ssl: ssl.SSLContext | None = None


def read_tokens(path: Path) -> list[str]:
    """Return the tokens of a file, one per line; lines that begin with # are comments.

    Raises:
        ValueError: There is none, or the file cannot be read.

    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise ValueError(f"{path} has no token")
    return tokens


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def checked_request(endpoint: Endpoint, service: DraftService) -> Callable[..., Response | None]:
    """Return the check of a connection: its token, its path, and ``GET /metrics``."""

    def check(connection: ServerConnection, request: Request) -> Response | None:
        sent = request.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        if endpoint.tokens and not any(hmac.compare_digest(sent, token.encode()) for token in endpoint.tokens):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "a token is needed\n")
        path = request.path.partition("?")[0]
        if path == "/metrics":
            body = prometheus_client.generate_latest(service.metrics.registry)
            headers = Headers([("Content-Type", prometheus_client.CONTENT_TYPE_LATEST), ("Connection", "close")])
            headers["Content-Length"] = str(len(body))
            return Response(200, "OK", headers, body)
        if path != protocol.PATH:
            return connection.respond(http.HTTPStatus.NOT_FOUND, f"the path is {protocol.PATH}\n")
        return None

    return check


@contextlib.asynccontextmanager
async def serving(endpoint: Endpoint, service: DraftService) -> AsyncIterator[Server]:
    """Serve inside of the context; its value is the ``Server``."""
    async with serve(
        service.serve,
        endpoint.host,
        endpoint.port,
        ssl=endpoint.ssl,
        subprotocols=[websockets.Subprotocol(protocol.SUBPROTOCOL)],
        process_request=checked_request(endpoint, service),
        # A page in a browser must not use a server on its own machine.
        origins=[None],
        compression=None,
        max_size=protocol.MAX_ENGINE_FRAME,
        max_queue=16,
        server_header=None,
        close_timeout=1,
    ) as server:
        model = asyncio.create_task(service.run())
        try:
            yield server
        finally:
            model.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await model


async def run(endpoint: Endpoint, service: DraftService, ready: Callable[[Server], None] = lambda server: None) -> None:
    """Serve until SIGINT or SIGTERM."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, ended.set)
    async with serving(endpoint, service) as server:
        ready(server)
        await ended.wait()
