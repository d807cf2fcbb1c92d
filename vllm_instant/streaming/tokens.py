"""Session tokens: credentials with which a browser opens sessions, since it must not hold the API key."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator

from itsdangerous import BadData, URLSafeSerializer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

PREFIX = "ist-"
"""Prefix of every session token."""
SUBPROTOCOL = "instant-token."
"""Prefix of the WebSocket subprotocol in which a browser sends its token."""
CLIENT = "instant_client"
"""Key of a connection's scope: the client that a session token was issued for."""
SESSION_PATHS = ("/v1/instant/session", "/v1/instant/sessions")
"""The paths that session tokens open, with all paths below the second."""


class SessionTokens:
    """Issues and checks tokens, signed with a random key of this process, so that none outlives it.

    Args:
        clock: Time in seconds since the epoch.

    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        # The expiry is part of the payload: itsdangerous' own time stamps have whole seconds only.
        self._serializer = URLSafeSerializer(
            secrets.token_bytes(32), salt="vllm-instant session", signer_kwargs={"digest_method": hashlib.sha256}
        )
        self._clock = clock

    def make(self, client: str | None, seconds: float) -> str:
        """Return a token that is valid for ``seconds``; sessions count for ``client``, or for a client of its own."""
        payload = [self._clock() + seconds, client or secrets.token_urlsafe(9)]
        return PREFIX + str(self._serializer.dumps(payload))

    def client_of(self, token: str) -> str | None:
        """Return the client that a token was issued for; None for a foreign or expired token."""
        if not token.startswith(PREFIX):
            return None
        try:
            expires, client = self._serializer.loads(token.removeprefix(PREFIX))
        except BadData:
            return None
        return str(client) if self._clock() < expires else None


class AuthMiddleware:
    """ASGI middleware before the API-key check that accepts a session token instead of the key, for sessions only.

    Args:
        app: The application, including the API-key check.
        tokens: Checks the tokens.
        key: An API key of the server.
        public: Paths whose GET requests need no key.

    """

    def __init__(self, app: ASGIApp, tokens: SessionTokens, key: str, public: Iterable[str] = ()) -> None:
        self._app = app
        self._tokens = tokens
        self._key = key
        self._public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a connection, with the API key if its token or its path allows it."""
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
