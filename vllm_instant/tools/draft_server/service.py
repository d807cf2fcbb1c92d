"""The draft server: engines connect, and one model drafts for all of their requests in turn.

The request with the fewest tokens ahead of its engine comes first. A call of the model drafts a few tokens, in a thread
of its own, while the event loop takes what the engines commit; a model that batches calls gets several at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import websockets
from websockets.asyncio.server import ServerConnection

from vllm_instant.remote import protocol
from vllm_instant.remote.prefixes import PrefixStore
from vllm_instant.remote.protocol import Close, Committed, Declined, Hello, Message, Missing, Open, ProtocolError
from vllm_instant.tools.draft_server.drafting import DraftedRequest, Path
from vllm_instant.tools.draft_server.metrics import DraftServerMetrics
from vllm_instant.tools.draft_server.model import DraftModel, ModelError

logger = logging.getLogger("vllm.instant.draft_server")

HELLO_SECONDS = 10.0
"""Seconds within which an engine must send its first message."""
MAX_OUTGOING = 256
"""Maximum number of messages that wait for an engine that does not read them."""
GATHER_SECONDS = 0.002
"""Drafts of other requests that are made meanwhile travel in one frame: a frame costs the engine's processor far more
than a message in it."""


@dataclass(frozen=True)
class DraftServerLimits:
    """Limits of a draft server."""

    max_clients: int = 16
    """Maximum number of connections."""
    max_requests: int = 256
    """Maximum number of live requests."""
    max_requests_per_client: int = 64
    """Maximum number of live requests per connection."""
    max_messages_per_second: float = 5000.0
    """Maximum number of messages per second and connection, over two seconds."""
    max_prefix_tokens: int = 1 << 20
    """Maximum number of tokens of earlier requests that are kept, so that later ones need not send them again."""
    burst_tokens: int = 4
    """Maximum number of tokens that are drafted for one request before another one has its turn."""


@dataclass(eq=False)
class _Client:
    """One connected engine."""

    socket: ServerConnection
    owner: str
    """Hash of its token: caches are shared between its connections, by tenant."""
    vocab_size: int
    requests: dict[int, _Job] = field(default_factory=dict)
    outgoing: asyncio.Queue[Message] = field(default_factory=lambda: asyncio.Queue(MAX_OUTGOING))


@dataclass(eq=False)
class _Job:
    """A live request."""

    key: int
    client: _Client
    tenant: str
    drafted: DraftedRequest
    served: int = 0
    """Number of the model's call that served it last."""


class DraftService:
    """Serves the connections of engines.

    Args:
        model: What drafts.
        hello: What must agree at both ends.
        limits: Of clients and requests.
        clock: Monotonic time in seconds.

    """

    def __init__(
        self,
        model: DraftModel,
        hello: Hello,
        limits: DraftServerLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = DraftServerMetrics()
        self._model = model
        self._hello = hello
        self._limits = limits or DraftServerLimits()
        self._clock = clock
        self._prefixes = PrefixStore(self._limits.max_prefix_tokens)
        self._clients: set[_Client] = set()
        self._jobs: dict[int, _Job] = {}
        self._keys = count()
        self._calls = count(1)
        self._wake = asyncio.Event()
        self._calling: dict[int, asyncio.Task[None]] = {}
        """Calls of the model by request."""
        self._threads = ThreadPoolExecutor(model.max_parallel, thread_name_prefix="draft-model")

    # -------------------------------------------------------------------------------------------- connections

    async def serve(self, socket: ServerConnection) -> None:
        """Serve one engine until its connection closes."""
        if len(self._clients) >= self._limits.max_clients:
            self.metrics.refused.labels("clients").inc()
            await socket.close(protocol.OVERLOADED, f"at most {self._limits.max_clients} engines may connect")
            return
        client: _Client | None = None
        try:
            client = await self._welcome(socket)
            if client is not None:
                await self._follow(client)
        except ProtocolError as error:
            await socket.close(protocol.VIOLATION, str(error)[:120])
        except (websockets.ConnectionClosed, TimeoutError):
            pass
        finally:
            if client is not None:
                self._leave(client)

    async def _welcome(self, socket: ServerConnection) -> _Client | None:
        """Exchange the first messages; returns None, with the connection closed, if the ends do not agree."""
        async with asyncio.timeout(HELLO_SECONDS):
            first = protocol.read_from_engine(await socket.recv())
        if not first or not isinstance(first[0], Hello):
            raise ProtocolError("the first message must be a hello")
        if first[0].vocab_size < 2:
            raise ProtocolError("the vocabulary has at least two tokens")
        await socket.send(protocol.encode([self._hello]))
        reason = protocol.disagreement(self._hello, first[0])
        if reason is not None:
            self.metrics.refused.labels("disagreement").inc()
            await socket.close(protocol.MISMATCH, reason[:120])
            return None
        credential = socket.request.headers.get("Authorization", "") if socket.request is not None else ""
        client = _Client(socket, hashlib.sha256(credential.encode()).hexdigest(), first[0].vocab_size)
        self._clients.add(client)
        self.metrics.clients.set(len(self._clients))
        return client

    def _leave(self, client: _Client) -> None:
        for number in list(client.requests):
            self._close(client, number)
        self._clients.discard(client)
        self.metrics.clients.set(len(self._clients))

    async def _follow(self, client: _Client) -> None:
        sender = asyncio.create_task(self._send(client))
        limit = self._limits.max_messages_per_second
        budget, refilled = 2 * limit, self._clock()
        try:
            async for frame in client.socket:
                now = self._clock()
                budget = min(2 * limit, budget + (now - refilled) * limit)
                refilled = now
                messages = protocol.read_from_engine(frame)
                budget -= max(1, len(messages))
                if budget < 0:
                    raise ProtocolError(f"at most {limit:g} messages per second are allowed")
                for message in messages:
                    self._take(client, message)
                self._wake.set()
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, websockets.ConnectionClosed):
                await sender

    async def _send(self, client: _Client) -> None:
        while True:
            messages = [await client.outgoing.get()]
            await asyncio.sleep(GATHER_SECONDS)
            while not client.outgoing.empty() and len(messages) < protocol.MAX_MESSAGES:
                messages.append(client.outgoing.get_nowait())
            await client.socket.send(protocol.encode(messages))

    def _queue(self, client: _Client, message: Message) -> None:
        try:
            client.outgoing.put_nowait(message)
        except asyncio.QueueFull:
            # It does not read. Its drafts are worthless by now.
            client.socket.transport.abort()

    # ----------------------------------------------------------------------------------------------- requests

    def _take(self, client: _Client, message: Any) -> None:
        if isinstance(message, Open):
            self._open(client, message)
        elif isinstance(message, Committed):
            job = client.requests.get(message.request)
            if job is not None:
                self._commit(client, job, message)
        elif isinstance(message, Close):
            self._close(client, message.request)
        else:
            raise ProtocolError("a hello comes first only")

    def _open(self, client: _Client, message: Open) -> None:
        reason = None
        if message.request in client.requests:
            raise ProtocolError("a request is opened twice")
        prefix = self._prefixes.tokens_of(client.owner, message.prefix)
        if prefix is None:
            self._queue(client, Missing(message.request))
            return
        tokens = prefix + message.tokens
        if not tokens or len(tokens) >= self._model.max_tokens:
            reason = f"requests have 1 to {self._model.max_tokens - 1} tokens"
        elif max(message.tokens, default=0) >= self._model.vocab_size:
            reason = f"token ids must be below {self._model.vocab_size}"
        elif len(client.requests) >= self._limits.max_requests_per_client:
            reason = f"at most {self._limits.max_requests_per_client} requests per engine"
        elif len(self._jobs) >= self._limits.max_requests:
            reason = f"at most {self._limits.max_requests} requests"
        if reason is not None:
            self.metrics.refused.labels("requests").inc()
            self._queue(client, Declined(message.request, reason))
            return
        self._prefixes.add(client.owner, message.tenant, tokens)
        drafted = DraftedRequest(message.request, tokens, message.ahead)
        job = _Job(next(self._keys), client, message.tenant, drafted)
        client.requests[message.request] = self._jobs[job.key] = job
        self.metrics.requests.set(len(self._jobs))

    def _commit(self, client: _Client, job: _Job, message: Committed) -> None:
        drafted = job.drafted
        if len(drafted.committed) + len(message.tokens) >= self._model.max_tokens:
            self._decline(job, f"requests have at most {self._model.max_tokens} tokens")
            return
        if max(message.tokens, default=0) >= self._model.vocab_size:
            self._decline(job, f"token ids must be below {self._model.vocab_size}")
            return
        accepted, restarts = drafted.num_accepted, drafted.num_restarts
        drafted.commit(message.position, message.tokens, message.ahead)
        self.metrics.committed.inc(len(message.tokens))
        self.metrics.accepted.inc(drafted.num_accepted - accepted)
        self.metrics.restarts.inc(drafted.num_restarts - restarts)

    def _close(self, client: _Client, number: int) -> None:
        job = client.requests.pop(number, None)
        if job is not None:
            del self._jobs[job.key]
            self._prefixes.add(client.owner, job.tenant, job.drafted.committed)
            self.metrics.requests.set(len(self._jobs))
            self._release(job.key)

    def _decline(self, job: _Job, reason: str) -> None:
        """Draft no more for a live request."""
        self.metrics.refused.labels("requests").inc()
        self._close(job.client, job.drafted.number)
        self._queue(job.client, Declined(job.drafted.number, reason))

    def _release(self, key: int) -> None:
        with contextlib.suppress(RuntimeError):  # the server ends
            self._threads.submit(self._model.release, key)

    # --------------------------------------------------------------------------------------------- the model

    async def run(self) -> None:
        """Draft until cancelled."""
        try:
            while True:
                found = self._next_job() if len(self._calling) < self._model.max_parallel else None
                if found is None:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                job, path = found
                job.served = next(self._calls)
                task = self._calling[job.key] = asyncio.create_task(self._draft(job, path))
                task.add_done_callback(functools.partial(self._called, job.key))
        finally:
            for task in self._calling.values():
                task.cancel()
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _called(self, key: int, task: asyncio.Task[None]) -> None:
        del self._calling[key]
        if not task.cancelled() and task.exception() is not None:
            logger.error("A call of the model was lost", exc_info=task.exception())
        self._wake.set()

    def _next_job(self) -> tuple[_Job, Path] | None:
        """The request with the fewest tokens ahead that needs more; another likely outcome if none does."""

        def in_order(idle: bool) -> Iterator[tuple[_Job, Path]]:
            waiting = (job for job in self._jobs.values() if job.key not in self._calling)
            for job in sorted(waiting, key=lambda job: (job.drafted.num_ahead, job.served)):
                path = job.drafted.next_work(idle)
                if path is not None:
                    yield job, path

        return next(in_order(False), None) or next(in_order(True), None)

    async def _draft(self, job: _Job, path: Path) -> None:
        drafted, client = job.drafted, job.client
        length = min(self._limits.burst_tokens, drafted.room(path))
        sequence = drafted.sequence(path)
        began = self._clock()
        arguments = (job.key, (client.owner, job.tenant), sequence, length, client.vocab_size)
        try:
            guesses = await asyncio.get_running_loop().run_in_executor(self._threads, self._model.draft, *arguments)
        except Exception as error:  # of one request; the others must be served
            if isinstance(error, ModelError):
                logger.warning("A request gets no drafts: %s", error)
            else:
                logger.exception("The model failed for a request")
            if job.key in self._jobs:
                self._decline(job, "the model failed")
            self._release(job.key)
            return
        self.metrics.model_seconds.inc(max(0.0, self._clock() - began))
        if job.key not in self._jobs:
            # It ended meanwhile: its cache was released before this call wrote it again.
            self._release(job.key)
            return
        tail = drafted.extend(path, guesses)
        if tail is not None:
            self.metrics.drafted.inc(len(tail.tokens))
            self._queue(client, tail)
