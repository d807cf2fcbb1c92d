"""The connection to a draft server: a daemon thread with an event loop of its own, which keeps what has arrived.

Whatever the server does, the engine sees only whether drafts are there. A server that is gone, breaks the protocol or
sends more than it was asked for is left, and tried again later and later; the requests are then opened anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import websockets
from websockets.asyncio.client import ClientConnection, connect

from vllm_instant.remote import protocol
from vllm_instant.remote.prefixes import BLOCK_TOKENS, KnownPrefixes, block_hashes
from vllm_instant.remote.protocol import (
    Close,
    Committed,
    Declined,
    Hello,
    Message,
    Missing,
    Open,
    ProtocolError,
    Tail,
)
from vllm_instant_plugins.remote.branches import Branch, RequestBranches
from vllm_instant_plugins.remote.drafter import NewTokens

logger = logging.getLogger("vllm.instant")

TIMEOUT = 10.0
"""Seconds for a connection with its first messages."""
STEADY_SECONDS = 60.0
"""After a connection of this length the next attempt waits for the shortest time."""
MAX_OUTGOING = 4096
"""Maximum number of messages that wait for a server that does not read them."""
MESSAGES_PER_SECOND, MESSAGES_PER_REQUEST = 200.0, 100.0
"""Messages that a server may send, per second, and more of them per second and live request."""
BURST_SECONDS = 2.0
MAX_PREFIXES = 1 << 14
"""Maximum number of blocks of tokens that the server may remember; one that it has forgotten costs a round trip."""
MAX_WRONG_MESSAGES = 64
"""Number of useless or wrong tails after which a connection is closed."""


@dataclass
class ServerAddress:
    """Where the draft server is, and how it is reached."""

    url: str
    """``wss://host:port`` or ``ws://host:port``."""
    token: str | None = None
    ssl: ssl.SSLContext | None = None
    min_backoff: float = 0.5
    """Seconds until the first further attempt; doubled after each."""
    max_backoff: float = 30.0
    """Maximum number of seconds between two attempts."""


@dataclass
class _Request:
    """A live request as the thread knows it."""

    request_id: str
    branches: RequestBranches
    tenant: str
    number: int = 0
    """Its number on this connection."""
    open: bool = False
    """Whether the server knows it."""
    prefixed: bool = False
    """Whether it was opened with a prefix that the server was sent earlier."""


class DraftServerConnection:
    """Keeps the drafts of one draft server.

    Args:
        address: Of the server.
        hello: What must agree at both ends.
        max_draft_tokens: Maximum number of draft tokens per request and step.

    """

    def __init__(self, address: ServerAddress, hello: Hello, max_draft_tokens: int) -> None:
        self.published: dict[str, Sequence[Branch]] = {}
        """The branches that have arrived, by request; read by the engine's thread."""
        self.num_connections = 0
        """Number of connections so far."""
        self.bytes_sent = self.bytes_received = 0
        self._address = address
        self._hello = hello
        self._max_draft_tokens = max_draft_tokens
        self._requests: dict[str, _Request] = {}
        self._ids: dict[int, str] = {}
        """Request by its number on the connection."""
        self._numbers = count()
        self._prefixes = KnownPrefixes(MAX_PREFIXES)
        self._outgoing: list[Message] = []
        self._wake = asyncio.Event()
        self._is_open = False
        self._socket: ClientConnection | None = None
        self._first_attempt = threading.Event()
        self._mismatch: str | None = None
        self._budget = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="remote-drafter", daemon=True)

    # ------------------------------------------------------------------------------------- the engine's thread

    def start(self, seconds: float) -> str | None:
        """Start, and wait up to ``seconds`` for the first attempt; returns why the server cannot be used, or None."""
        self._thread.start()
        self._started.wait()
        if not self._first_attempt.wait(seconds):
            logger.warning("The draft server %s does not answer yet; there are no drafts until it does", self._where)
        return self._mismatch

    def advance(self, news: Sequence[NewTokens], ended: Sequence[str]) -> None:
        """Tell the server of new tokens and of requests that have ended; returns at once."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._advance, news, ended)

    def close(self) -> None:
        """End the thread."""
        loop, task = self._loop, self._task
        if loop is not None and task is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)
        self._thread.join(5.0)

    # --------------------------------------------------------------------------------------------- the thread

    @property
    def _where(self) -> str:
        return self._address.url.rpartition("@")[2]

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._started.set()
        backoff = self._address.min_backoff
        problem = ""
        while self._mismatch is None:
            began = time.monotonic()
            try:
                await self._connect_once()
                found = "it closed the connection"
            except Exception as error:  # of the network, of the protocol, of what comes from there
                found = protocol.one_line(f"{type(error).__name__}: {error}")
            finally:
                self._lose_connection()
            if found != problem and self._mismatch is None:
                problem = found
                logger.warning("The draft server %s gives no drafts (%s); trying again", self._where, found)
            if time.monotonic() - began > STEADY_SECONDS:
                backoff = self._address.min_backoff
            await asyncio.sleep(backoff * random.uniform(0.75, 1.25))
            backoff = min(self._address.max_backoff, 2 * backoff)

    async def _connect_once(self) -> None:
        address = self._address
        headers = {"Authorization": f"Bearer {address.token}"} if address.token else {}
        try:
            async with asyncio.timeout(TIMEOUT):
                socket = await connect(
                    address.url.rstrip("/") + protocol.PATH,
                    subprotocols=[websockets.Subprotocol(protocol.SUBPROTOCOL)],
                    additional_headers=headers,
                    ssl=address.ssl,
                    compression=None,
                    proxy=None,
                    max_size=protocol.MAX_SERVER_FRAME,
                    max_queue=16,
                    ping_interval=20,
                    ping_timeout=20,
                    close_timeout=1,
                )
        except websockets.InvalidStatus as error:
            status = error.response.status_code
            if status == 401 and not self._first_attempt.is_set():
                self._refuse("it refuses the token (HTTP 401)")
            raise ProtocolError(f"it answers HTTP {status}") from None
        try:
            await self._serve(socket)
        except ProtocolError:
            # No farewell: the other end would have to read it.
            socket.transport.abort()
            raise
        finally:
            await socket.close()

    async def _serve(self, socket: ClientConnection) -> None:
        await self._agree(socket)
        if self._mismatch is not None:
            return
        logger.info("Connected to the draft server %s", self._where)
        self.num_connections += 1
        self._is_open, self._socket = True, socket
        for request in self._requests.values():
            self._open(request)
        sender = asyncio.create_task(self._send(socket))
        try:
            await self._receive(socket)
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, websockets.WebSocketException):
                await sender

    async def _agree(self, socket: ClientConnection) -> None:
        """Exchange the first messages."""
        if socket.subprotocol != protocol.SUBPROTOCOL:
            self._refuse(f"it does not speak version {protocol.VERSION} of the protocol")
            return
        try:
            async with asyncio.timeout(TIMEOUT):
                await socket.send(protocol.encode([self._hello]))
                first = protocol.read_from_server(await socket.recv())
        except websockets.ConnectionClosed as error:
            if error.rcvd is not None and error.rcvd.code == protocol.MISMATCH:
                self._refuse(error.rcvd.reason)
                return
            raise
        if len(first) != 1 or not isinstance(first[0], Hello):
            raise ProtocolError("the first message is no hello")
        reason = protocol.disagreement(self._hello, first[0])
        if reason is not None:
            self._refuse(reason)
        self._first_attempt.set()

    def _refuse(self, reason: str) -> None:
        """The server can never be used."""
        self._mismatch = reason = protocol.one_line(reason)
        if self._first_attempt.is_set():
            logger.error("The draft server %s is not used any more: %s", self._where, reason)
        self._first_attempt.set()

    def _lose_connection(self) -> None:
        self._is_open, self._socket = False, None
        self._outgoing.clear()
        self._ids.clear()
        self.published.clear()
        for request in self._requests.values():
            request.open = False
        self._first_attempt.set()

    # ------------------------------------------------------------------------------------------------ sending

    def _advance(self, news: Sequence[NewTokens], ended: Sequence[str]) -> None:
        for new in news:
            request = self._requests.get(new.request_id)
            if request is None:
                branches = RequestBranches(new.tokens, 1 + 2 * self._max_draft_tokens, self._hello.vocab_size)
                request = _Request(new.request_id, branches, protocol.tenant_of(new.cache_salt))
                self._requests[new.request_id] = request
                if self._is_open:
                    self._open(request)
                continue
            ahead = request.branches.ahead(self._max_draft_tokens)
            request.branches.commit(new.tokens, ahead)
            if request.open and len(request.branches.tokens) > protocol.MAX_CONTEXT:
                self._close_request(request)
            if request.open:
                self._publish(new.request_id, request)
                self._queue(Committed(request.number, new.position, new.tokens, ahead))
        for request_id in ended:
            ended_request = self._requests.pop(request_id, None)
            if ended_request is not None and ended_request.open:
                self._close_request(ended_request)

    def _close_request(self, request: _Request) -> None:
        request.open = False
        self._prefixes.add(block_hashes(request.branches.tokens, request.tenant))
        self.published.pop(request.request_id, None)
        self._ids.pop(request.number, None)
        self._queue(Close(request.number))

    def _open(self, request: _Request) -> None:
        if len(request.branches.tokens) > protocol.MAX_CONTEXT:
            return
        ahead = 1 + 2 * self._max_draft_tokens
        request.number = next(self._numbers)
        request.branches = RequestBranches(request.branches.tokens, ahead, self._hello.vocab_size)
        request.open = True
        self._ids[request.number] = request.request_id
        tokens, hashes = request.branches.tokens, block_hashes(request.branches.tokens, request.tenant)
        known = self._prefixes.longest(hashes)
        self._prefixes.add(hashes)
        request.prefixed = known > 0
        prefix = hashes[known - 1] if known else b""
        self._queue(Open(request.number, tokens[known * BLOCK_TOKENS :].tolist(), ahead, request.tenant, prefix))

    def _queue(self, message: Message) -> None:
        if len(self._outgoing) >= MAX_OUTGOING and self._socket is not None:
            # It does not read. What waits is dropped with the connection.
            self._socket.transport.abort()
        self._outgoing.append(message)
        self._wake.set()

    async def _send(self, socket: ClientConnection) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._outgoing:
                messages, self._outgoing = self._outgoing, []
                for frame in frames_of(messages):
                    self.bytes_sent += len(frame)
                    await socket.send(frame)

    # ---------------------------------------------------------------------------------------------- receiving

    async def _receive(self, socket: ClientConnection) -> None:
        wrong = 0
        self._budget, refilled = self._max_budget(), time.monotonic()
        while True:
            try:
                frame = await socket.recv()
            except websockets.ConnectionClosedOK:
                return
            self.bytes_received += len(frame)
            now = time.monotonic()
            per_second = self._max_budget() / BURST_SECONDS
            self._budget = min(self._max_budget(), self._budget + (now - refilled) * per_second)
            refilled = now
            messages = protocol.read_from_server(frame)
            self._budget -= max(1, len(messages))
            if self._budget < 0:
                raise ProtocolError("it sends more messages than it was asked for")
            wrong += sum(not self._take(message) for message in messages)
            if wrong > MAX_WRONG_MESSAGES:
                raise ProtocolError(f"more than {MAX_WRONG_MESSAGES} of its tails continue nothing")

    def _max_budget(self) -> float:
        return BURST_SECONDS * (MESSAGES_PER_SECOND + MESSAGES_PER_REQUEST * len(self._requests))

    def _take(self, message: Any) -> bool:
        """Take one message; returns False for a wrong one."""
        if isinstance(message, Hello):
            return False
        request_id = self._ids.get(message.request)
        if request_id is None:
            return True  # of a request that has ended meanwhile
        request = self._requests[request_id]
        if isinstance(message, Declined):
            request.open = False
            self._ids.pop(message.request)
            return True
        if isinstance(message, Missing):
            if not request.prefixed:
                return False
            # It was restarted, or has forgotten it.
            self._ids.pop(message.request)
            self._prefixes.clear()
            self._open(request)
            return True
        if not isinstance(message, Tail) or not request.branches.add(message):
            return False
        self._publish(request_id, request)
        return True

    def _publish(self, request_id: str, request: _Request) -> None:
        if request.branches.published:
            self.published[request_id] = request.branches.published
        else:
            self.published.pop(request_id, None)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The factory of uvloop, which vLLM brings: it takes less of the engine's time than asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def frames_of(messages: Sequence[Message]) -> list[bytes]:
    """Return frames of bounded numbers of messages and bytes."""
    frames, part, tokens = [], list[Message](), 0
    for message in messages:
        size = len(message.tokens) if isinstance(message, Open | Committed) else 1
        # A token id takes at most five bytes.
        if part and (len(part) == protocol.MAX_MESSAGES or 5 * (tokens + size) > protocol.MAX_ENGINE_FRAME // 2):
            frames.append(protocol.encode(part))
            part, tokens = [], 0
        part.append(message)
        tokens += size
    if part:
        frames.append(protocol.encode(part))
    return frames
