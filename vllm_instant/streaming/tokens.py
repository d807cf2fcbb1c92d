"""Session tokens: what a browser opens sessions with, which must not have the API key and cannot send it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

PREFIX = "ist-"
"""What a session token begins with."""
SUBPROTOCOL = "instant-token."
"""A browser hands its token over as a WebSocket subprotocol: this, and the token."""
CLIENT = "instant_client"
"""Where the scope of a connection says which client a session token was made for."""
SESSION_PATHS = ("/v1/instant/session", "/v1/instant/sessions")
"""What session tokens are good for, with everything below."""


class SessionTokens:
    """Makes and checks tokens; they are signed with a secret that this process drew, so none outlives it.

    Args:
        clock: seconds since the epoch.

    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._secret = secrets.token_bytes(32)
        self._clock = clock

    def make(self, client: str | None, seconds: float) -> str:
        """A token for ``seconds``; ``client`` names whom its sessions count for, None somebody of its own."""
        payload = json.dumps([self._clock() + seconds, client or secrets.token_urlsafe(9)]).encode()
        return PREFIX + _encoded(payload) + "." + _encoded(self._signature(payload))

    def client_of(self, token: str) -> str | None:
        """Whom a token was made for; None if it is not ours or too old."""
        text, dot, signature = token.removeprefix(PREFIX).partition(".")
        if not token.startswith(PREFIX) or not dot:
            return None
        try:
            payload, signed = _decoded(text), _decoded(signature)
        except (binascii.Error, ValueError):
            return None
        if not hmac.compare_digest(signed, self._signature(payload)):
            return None
        expires, client = json.loads(payload)
        return str(client) if self._clock() < expires else None

    def _signature(self, payload: bytes) -> bytes:
        return hmac.digest(self._secret, payload, hashlib.sha256)


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


class AuthMiddleware:
    """ASGI middleware in front of the API-key check: a session token stands for the key, for sessions and nothing else.

    Args:
        app: what comes behind, the API-key check among it.
        tokens: which tokens are good.
        key: an API key of the server.
        public: paths that need no key at all.

    """

    def __init__(self, app: ASGIApp, tokens: SessionTokens, key: str, public: Iterable[str] = ()) -> None:
        self._app = app
        self._tokens = tokens
        self._key = key
        self._public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on, with the key where it may have it."""
        if scope["type"] in ("http", "websocket"):
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path in self._public and scope.get("method") == "GET":
                scope = self._with_key(scope)
            elif path in SESSION_PATHS or path.startswith(SESSION_PATHS[1] + "/"):
                for token in _tokens_of(Headers(scope=scope)):
                    client = self._tokens.client_of(token)
                    if client is not None:
                        scope = {**self._with_key(scope), CLIENT: client}
                        break
        await self._app(scope, receive, send)

    def _with_key(self, scope: Scope) -> Scope:
        headers = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
        return {**scope, "headers": [*headers, (b"authorization", f"Bearer {self._key}".encode())]}


def _tokens_of(headers: Headers) -> Iterator[str]:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.startswith(PREFIX):
        yield token
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        if protocol.strip().startswith(SUBPROTOCOL):
            yield protocol.strip().removeprefix(SUBPROTOCOL)
