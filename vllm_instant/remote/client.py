"""A client that sends drafts for its own request from its own device.

    key = new_key()
    request = {"model": "demo", "prompt": prompt, "stream": True, "return_token_ids": True,
               "vllm_xargs": {"instant_draft_key": key}}
    async with DraftPusher("http://127.0.0.1:8000", key) as drafts:
        ...                                    # the answer streams; token_ids of its chunks are collected in `output`
        await drafts.begin(len(output), draft_model(prompt_ids + output))

Positions count output tokens. The package ``websockets`` is a dependency of vLLM.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import websockets
from websockets.asyncio.client import ClientConnection, connect

from vllm_instant.remote import protocol
from vllm_instant.remote.protocol import Claim, Hello, Tail


class DraftPushError(Exception):
    """The server does not take drafts; the message is one sentence."""


def new_key() -> str:
    """Return a key for a request's ``vllm_xargs``: ``{"instant_draft_key": key}``."""
    return secrets.token_urlsafe(24)


class DraftPusher:
    """Sends drafts for one request; an asynchronous context manager.

    Args:
        url: URL of the server, without ``/v1``.
        key: The request's ``instant_draft_key``.
        api_key: API key of the server.
        token: A session token, instead of the key.
        fingerprint: ``protocol.tokenizer_fingerprint`` of the draft model, which must be the target's; empty for no
            comparison.

    """

    def __init__(
        self, url: str, key: str, *, api_key: str | None = None, token: str | None = None, fingerprint: str = ""
    ) -> None:
        self._url = "ws" + url.rstrip("/").removeprefix("http") + "/v1/instant/draft"
        credential = api_key or token
        self._headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        self._key = key
        self._hello = Hello(protocol.VERSION, fingerprint, 0)
        self._connection: ClientConnection | None = None
        self._branch = self._base = self._stop = -1
        self.vocab_size = 0
        """Number of token ids of the target; drafts with others are dropped."""

    async def __aenter__(self) -> Self:
        try:
            self._connection = await connect(
                self._url,
                subprotocols=[websockets.Subprotocol(protocol.SUBPROTOCOL)],
                additional_headers=self._headers,
                compression=None,
            )
            await self._connection.send(protocol.encode([self._hello, Claim(0, self._key)]))
            [hello] = protocol.read_from_server(await self._connection.recv())
        except websockets.InvalidStatus as error:
            raise DraftPushError(
                f"{self._url} answers HTTP {error.response.status_code}; 401: an API key is needed, 403 and 404: the "
                "server needs [drafter] plugin = 'remote' with client_drafts = true"
            ) from None
        except websockets.ConnectionClosed as error:
            raise DraftPushError(f"the server closed the connection: {error}") from None
        reason = protocol.disagreement(self._hello, hello) if isinstance(hello, Hello) else "it sent no hello"
        if reason is not None or not isinstance(hello, Hello):
            await self._connection.close()
            raise DraftPushError(f"the server takes no drafts: {reason}")
        self.vocab_size = hello.vocab_size
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def begin(self, num_output_tokens: int, tokens: Sequence[int], probabilities: Sequence[float] = ()) -> None:
        """Send a draft that continues the answer's first ``num_output_tokens`` tokens.

        Args:
            num_output_tokens: Number of output tokens that the client has received.
            tokens: Token ids, 1 to 128.
            probabilities: The draft model's probability of each token, or nothing.

        """
        self._branch += 1
        self._base = self._stop = num_output_tokens
        await self.extend(num_output_tokens, tokens, probabilities)

    async def extend(self, num_output_tokens: int, tokens: Sequence[int], probabilities: Sequence[float] = ()) -> None:
        """Continue the draft of the last call, which the answer follows so far."""
        if self._connection is None or self._branch < 0:
            raise DraftPushError("a draft must be begun first, inside of 'async with'")
        tail = Tail(
            0,
            self._branch,
            self._base,
            self._stop,
            num_output_tokens,
            list(tokens),
            protocol.to_bytes(probabilities),
        )
        self._stop += len(tokens)
        try:
            await self._connection.send(protocol.encode([tail]))
        except websockets.ConnectionClosed as error:
            raise DraftPushError(f"the server closed the connection: {error}") from None
