"""Session tokens: credentials with which a browser opens sessions, since it must not hold the API key.

A token is a random name; what it permits is stored in the process that issued it, so that it ends with that process,
can be withdrawn, and cannot be changed by its holder.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

PREFIX = "ist-"
"""Prefix of every session token."""
SUBPROTOCOL = "instant-token."
"""Prefix of the WebSocket subprotocol in which a browser sends its token."""
GRANT = "instant_grant"
"""Key of a connection's scope: the ``Grant`` of its session token."""
SESSION_PATHS = ("/v1/instant/session", "/v1/instant/sessions", "/v1/instant/draft")
"""The paths that session tokens open, with all paths below the second."""
MAX_TOKENS = 10_000
"""Maximum number of valid tokens per process."""
SWEEP_SECONDS = 60.0
"""Time after which a new token has the expired ones removed."""


@dataclass
class Grant:
    """What the holder of one session token may do."""

    client: str
    """The client whose limits apply."""
    expires: float
    """Time until which the token opens sessions, on the clock of ``SessionTokens``."""
    session: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the chat request that the holder cannot change."""
    max_sessions: int | None = None
    """Number of sessions that the token opens in all; None for no limit."""
    session_seconds: float | None = None
    """Seconds after which a session of the token is closed; None for no limit."""
    key: str | None = None
    """The API key that issued the token; its sessions count as that key's wherever keys are told apart."""
    num_opened: int = 0
    """Number of sessions opened so far."""

    def take_session(self) -> bool:
        """Count a session that opens; returns False if ``max_sessions`` are used up."""
        if self.max_sessions is not None and self.num_opened >= self.max_sessions:
            return False
        self.num_opened += 1
        return True


class TooManyTokensError(Exception):
    """``MAX_TOKENS`` valid tokens exist."""


class SessionTokens:
    """Issues and checks tokens.

    Args:
        clock: Monotonic time in seconds: a change of the wall clock must not lengthen a token's life.

    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._grants: dict[bytes, Grant] = {}
        # When expired grants were last removed.
        self._swept = clock()

    def make(self, client: str | None, seconds: float, key: str | None = None, **scope: Any) -> str:
        """Return a token that is valid for ``seconds``.

        Args:
            client: Its sessions count for this client; None for a client of its own.
            seconds: Time for which the token opens sessions.
            key: The API key of the request that asks for it.
            scope: ``session``, ``max_sessions`` and ``session_seconds`` of the ``Grant``.

        Raises:
            TooManyTokensError: There are ``MAX_TOKENS`` valid tokens.

        """
        now = self._clock()
        # A token that is not shown again is not looked up, and would stay.
        if len(self._grants) >= MAX_TOKENS or now - self._swept >= SWEEP_SECONDS:
            self._swept = now
            self._grants = {digest: grant for digest, grant in self._grants.items() if grant.expires > now}
        if len(self._grants) >= MAX_TOKENS:
            raise TooManyTokensError
        token = PREFIX + secrets.token_urlsafe(32)
        self._grants[_digest(token)] = Grant(client or secrets.token_urlsafe(9), now + seconds, key=key, **scope)
        return token

    def grant_of(self, token: str) -> Grant | None:
        """Return what a token permits; None for a foreign or expired token."""
        # Looked up by digest, so that the time of the comparison says nothing about the token.
        digest = _digest(token)
        grant = self._grants.get(digest)
        if grant is not None and self._clock() >= grant.expires:
            del self._grants[digest]
            return None
        return grant


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class AuthMiddleware:
    """ASGI middleware before the API-key check that accepts a session token instead of the key, for sessions only.

    Args:
        app: The application, including the API-key check.
        tokens: Checks the tokens.
        keys: The API keys of the server.
        public: Paths whose GET requests need no key.

    """

    def __init__(self, app: ASGIApp, tokens: SessionTokens, keys: Sequence[str], public: Iterable[str] = ()) -> None:
        self._app = app
        self._tokens = tokens
        self._keys = tuple(keys)
        self._public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a connection, with an API key if its token or its path allows it."""
        if scope["type"] in ("http", "websocket"):
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path in self._public and scope.get("method") == "GET":
                scope = _with_key(scope, self._keys[0])
            elif path in SESSION_PATHS or path.startswith(SESSION_PATHS[1] + "/"):
                for token in _tokens_of(Headers(scope=scope)):
                    grant = self._tokens.grant_of(token)
                    if grant is not None and (grant.key in self._keys):
                        scope = {**_with_key(scope, str(grant.key)), GRANT: grant}
                        break
        await self._app(scope, receive, send)


def _with_key(scope: Scope, key: str) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
    return {**scope, "headers": [*headers, (b"authorization", f"Bearer {key}".encode())]}


def bearer_of(headers: Headers) -> str | None:
    """Return the parameter of a ``Bearer`` authorization, read as vLLM reads it; None without one."""
    scheme, _, parameter = headers.get("authorization", "").partition(" ")
    return parameter if scheme.lower() == "bearer" else None


def _tokens_of(headers: Headers) -> Iterator[str]:
    bearer = bearer_of(headers)
    if bearer is not None and bearer.startswith(PREFIX):
        yield bearer
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        if protocol.strip().startswith(SUBPROTOCOL):
            yield protocol.strip().removeprefix(SUBPROTOCOL)
