"""HTTP clients for vLLM servers.

A server on this machine is asked directly: proxies of the environment are for other hosts, and a proxy that cannot
reach 127.0.0.1 would make every local server look dead.
"""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

import httpx

KEEP_ALIVE_SECONDS = 1.0
"""Time after which an idle connection is not used again.

vLLM's server closes it after 5 seconds (``VLLM_HTTP_TIMEOUT_KEEP_ALIVE``), httpx by default leaves it after 5 seconds:
a request sent at that moment would fail, though its server is well.
"""


def base_url(url: str) -> str:
    """The address of a server without a trailing slash and without ``/v1``, which clients of OpenAI's API append."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def is_local(url: str) -> bool:
    """Whether the address belongs to this machine's loopback interface."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def sync_client(url: str, *, max_connections: int | None = 100, **options: Any) -> httpx.Client:
    """A client with ``url`` as its base.

    Args:
        url: of the server.
        max_connections: None: as many as there are requests.
        options: of httpx, but its limits.

    """
    return httpx.Client(base_url=url, trust_env=not is_local(url), limits=_limits(max_connections), **options)


def async_client(url: str, *, max_connections: int | None = 100, **options: Any) -> httpx.AsyncClient:
    """As ``sync_client``, asynchronous."""
    return httpx.AsyncClient(base_url=url, trust_env=not is_local(url), limits=_limits(max_connections), **options)


def _limits(max_connections: int | None) -> httpx.Limits:
    return httpx.Limits(
        max_connections=max_connections,
        max_keepalive_connections=max_connections or 64,
        keepalive_expiry=KEEP_ALIVE_SECONDS,
    )


def get(url: str, path: str, timeout: float = 10, **options: Any) -> httpx.Response:
    """One GET request; raises httpx.HTTPError where the server does not answer."""
    with sync_client(url, timeout=timeout) as client:
        return client.get(path, **options)
