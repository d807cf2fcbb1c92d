"""Who is at the other end of a connection, what web pages may do, and bodies of a limited size."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection, Request

from vllm_instant.streaming.events import EventError, loads
from vllm_instant.streaming.tokens import GRANT, Grant, bearer_of


@dataclass(frozen=True)
class ConnectionPolicy:
    """How connections are told apart, and which of them web pages may open."""

    checks_keys: bool = False
    """Whether vLLM checks API keys before a connection arrives here."""
    allowed_origins: Sequence[str] = ()
    """Origins that vLLM's ``--allowed-origins`` allows; ``*`` for all."""

    def client_of(self, connection: HTTPConnection) -> str:
        """Return the client of a connection: that of its session token, its API key, or its address.

        An unchecked ``Authorization`` header says nothing: with another one in each request, one client would be many.
        """
        grant = grant_of(connection)
        if grant is not None:
            return f"token {grant.client}"
        if self.checks_keys:
            key = bearer_of(connection.headers) or ""
            return f"key {hashlib.sha256(key.encode()).hexdigest()}"
        return f"address {connection.client.host if connection.client else ''}"

    def refusal(self, connection: HTTPConnection) -> str | None:
        """Return why a web page may not open this connection, or None.

        Browsers send an ``Origin`` with WebSockets and POST requests. Where vLLM checks keys the page has shown one, or
        a session token. Without keys anything that a browser on the same machine opens could use the server, so the
        page must come from the server itself or from an allowed origin.
        """
        origin = connection.headers.get("origin")
        if origin is None or self.checks_keys or "*" in self.allowed_origins or origin in self.allowed_origins:
            return None
        host = connection.headers.get("host", "")
        server = connection.scope.get("server")
        if urlsplit(origin).netloc.lower() != host.lower():
            return f"a page of {origin[:200]} may not use this server: add it to --allowed-origins"
        # A name that an attacker's DNS points to 127.0.0.1 is the page's own origin.
        if server is not None and _is_loopback(str(server[0])) and not _is_loopback(urlsplit(f"//{host}").hostname):
            return f"a page of {origin[:200]} may not use a server on loopback: add it to --allowed-origins"
        return None


def grant_of(connection: HTTPConnection) -> Grant | None:
    """Return the grant of a connection's session token; None for other connections."""
    found: Grant | None = connection.scope.get(GRANT)
    return found


def _is_loopback(host: str | None) -> bool:
    if host is None:
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def read_json(request: Request, max_bytes: int) -> Any:
    """Return the JSON body of a request; None for an empty one.

    Raises:
        EventError: The body is larger than ``max_bytes``, is not JSON, or is not declared as JSON. A web page can send
            other types to any server without asking first, so vLLM's own routes take ``application/json`` only, too.

    """
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise EventError(f"a body has at most {max_bytes} bytes", "too_large", status=413)
    if not body:
        return None
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise EventError("the content type must be application/json", "unsupported_media_type", status=415)
    return loads(bytes(body), "body")


def size_of(value: Any, max_values: int) -> int:
    """Return about how many bytes JSON types take in memory.

    Raises:
        EventError: There are more than ``max_values`` values: each costs far more memory than its few bytes of JSON.

    """
    size, values, rest = 0, 0, [value]
    while rest:
        inner = rest.pop()
        values += 1
        if isinstance(inner, dict):
            rest.extend(inner.keys())
            rest.extend(inner.values())
        elif isinstance(inner, list):
            rest.extend(inner)
        elif isinstance(inner, str):
            size += len(inner) if inner.isascii() else 4 * len(inner)
        if values + len(rest) > max_values:
            raise EventError(f"a session has at most {max_values} JSON values", "too_large", status=413)
    return size + 64 * values
