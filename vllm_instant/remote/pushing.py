"""``/v1/instant/draft``: clients send drafts for their own requests.

The route tells a client nothing about any request, not even whether a key belongs to one. What it sends can change no
answer: it is verified like every draft.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from vllm_instant.metrics import PREFIX
from vllm_instant.remote import protocol
from vllm_instant.remote.protocol import Claim, Close, Hello, ProtocolError, Tail
from vllm_instant.speculation.pushed_drafts import MAX_TAILS
from vllm_instant.streaming.connections import ConnectionPolicy

logger = logging.getLogger("vllm.instant")

PATH = "/v1/instant/draft"
TRY_AGAIN_LATER, GOING_AWAY, POLICY_VIOLATION = 1013, 1001, 1008
MAX_CONNECTIONS, MAX_CONNECTIONS_PER_CLIENT = 256, 16
MAX_CLAIMS = 16
"""Maximum number of requests per connection."""
MAX_FRAME_BYTES = 16 << 10
MESSAGES_PER_SECOND, BURST_SECONDS = 200.0, 2.0
IDLE_SECONDS = 300.0
"""Seconds without a message after which a connection is closed."""

Pushed = Mapping[str, Sequence[Sequence[Any]]]


class ClientDraftMetrics:
    """Metrics of one API server.

    Args:
        registry: Registry of the metrics; by default that of the process.

    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.connections = Gauge(
            f"{PREFIX}client_draft_connections",
            "Connections by which clients send drafts for their own requests.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.messages = Counter(
            f"{PREFIX}client_draft_messages", "Drafts that clients sent for their own requests.", registry=registry
        )


class ClientDrafts:
    """The route of one API server.

    Args:
        clock: Monotonic time in seconds.

    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._metrics: ClientDraftMetrics | None = None
        self._push: Callable[[Pushed], Awaitable[Any]] | None = None
        self._hello = Hello(protocol.VERSION, "", 0)
        self._policy = ConnectionPolicy()
        self._connections: dict[str, int] = {}
        """Number of connections by client."""
        self._pending: dict[str, list[Sequence[Any]]] = {}
        """Tails by key that are not with the engine yet."""
        self._wake = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    def attach(self, app: FastAPI) -> None:
        """Add the route, under ``/v1`` where the API key guards it."""
        app.add_api_websocket_route(PATH, self.serve)

    def start(
        self,
        push: Callable[[Pushed], Awaitable[Any]],
        hello: Hello,
        policy: ConnectionPolicy | None = None,
        metrics: ClientDraftMetrics | None = None,
    ) -> None:
        """Start to serve; called inside the server's event loop.

        Args:
            push: Sends tails by key to the engines.
            hello: What must agree with clients.
            policy: Which connections web pages may open.
            metrics: Those of this server; None for none.

        """
        self._push, self._hello, self._metrics = push, hello, metrics
        self._policy = policy or ConnectionPolicy()
        self._pump = asyncio.get_running_loop().create_task(self._run())

    async def serve(self, websocket: WebSocket) -> None:
        """Serve one client until its connection closes."""
        # Before the handshake, so that a page learns nothing but the refusal.
        if self._policy.refusal(websocket) is not None:
            await websocket.close(POLICY_VIOLATION)
            return
        if protocol.SUBPROTOCOL not in websocket.scope.get("subprotocols", ()):
            await websocket.close(protocol.MISMATCH)
            return
        client = self._policy.client_of(websocket)
        total = sum(self._connections.values())
        full = total >= MAX_CONNECTIONS or self._connections.get(client, 0) >= MAX_CONNECTIONS_PER_CLIENT
        if full or self._push is None:
            await websocket.close(TRY_AGAIN_LATER)
            return
        with self._counted(client):
            await websocket.accept(subprotocol=protocol.SUBPROTOCOL)
            try:
                code, reason = await self._follow(websocket)
                await websocket.close(code, reason[:120])
            except ProtocolError as error:
                with contextlib.suppress(RuntimeError):
                    await websocket.close(protocol.VIOLATION, str(error)[:120])
            except (WebSocketDisconnect, RuntimeError):
                pass  # the client has left

    @contextlib.contextmanager
    def _counted(self, client: str) -> Iterator[None]:
        self._connections[client] = self._connections.get(client, 0) + 1
        self._count_connections()
        try:
            yield
        finally:
            self._connections[client] -= 1
            if not self._connections[client]:
                del self._connections[client]
            self._count_connections()

    def _count_connections(self) -> None:
        if self._metrics is not None:
            self._metrics.connections.set(sum(self._connections.values()))

    async def _follow(self, websocket: WebSocket) -> tuple[int, str]:
        """Take messages; returns the code and the reason of the close."""
        keys: dict[int, str] = {}
        greeted = False
        budget, refilled = MESSAGES_PER_SECOND * BURST_SECONDS, self._clock()
        while True:
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    frame = await websocket.receive_bytes()
            except KeyError:
                raise ProtocolError("frames are binary") from None
            except TimeoutError:
                return GOING_AWAY, "the connection was idle"
            if len(frame) > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame has at most {MAX_FRAME_BYTES} bytes")
            messages = protocol.read_from_client(frame)
            now = self._clock()
            budget = min(MESSAGES_PER_SECOND * BURST_SECONDS, budget + (now - refilled) * MESSAGES_PER_SECOND)
            refilled = now
            budget -= max(1, len(messages))
            if budget < 0:
                raise ProtocolError(f"at most {MESSAGES_PER_SECOND:g} messages per second are allowed")
            for message in messages:
                if not greeted:
                    if not isinstance(message, Hello):
                        raise ProtocolError("the first message must be a hello")
                    await websocket.send_bytes(protocol.encode([self._hello]))
                    reason = protocol.disagreement(self._hello, message)
                    if reason is not None:
                        return protocol.MISMATCH, reason
                    greeted = True
                else:
                    self._take(keys, message)

    def _take(self, keys: dict[int, str], message: Any) -> None:
        if isinstance(message, Claim):
            if len(keys) >= MAX_CLAIMS and message.request not in keys:
                raise ProtocolError(f"a connection has at most {MAX_CLAIMS} requests")
            keys[message.request] = message.key
        elif isinstance(message, Close):
            keys.pop(message.request, None)
        elif isinstance(message, Tail):
            key = keys.get(message.request)
            if key is None:
                raise ProtocolError("a draft needs the key of its request first")
            if self._metrics is not None:
                self._metrics.messages.inc()
            waiting = self._pending.setdefault(key, [])
            fields = (message.branch, message.base, message.position, message.seen)
            waiting.append([*fields, message.tokens, message.probabilities])
            del waiting[:-MAX_TAILS]
            self._wake.set()
        else:
            raise ProtocolError("a hello comes first only")

    async def _run(self) -> None:
        """Send what is pending to the engines, one call at a time: an engine answers between two of its steps."""
        failed = False
        while self._push is not None:
            await self._wake.wait()
            self._wake.clear()
            pending, self._pending = self._pending, {}
            try:
                await self._push(pending)
                failed = False
            except Exception as error:  # the route must outlive an engine that does not answer
                if not failed:
                    logger.warning("Drafts of clients do not reach the engine: %s", type(error).__name__)
                failed = True
                await asyncio.sleep(1.0)
