"""Draft servers in a thread of this process: honest ones that know the answer, and hostile ones."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import msgspec
import websockets
from websockets.asyncio.server import ServerConnection, serve

from vllm_instant.remote import protocol
from vllm_instant.remote.protocol import Committed, Hello, Missing, Open, Tail

Handler = Callable[[ServerConnection], Awaitable[None]]
HELLO = Hello(protocol.VERSION, "", 1 << 30)


class ServerThread:
    """A WebSocket server; a context manager.

    Args:
        handler: Serves one connection; may be exchanged.
        options: Of ``websockets``' ``serve``.

    """

    def __init__(self, handler: Handler, **options):
        self.handler = handler
        self.url = ""
        self.num_connections = 0
        self._options = {"subprotocols": [protocol.SUBPROTOCOL], "max_size": None, "close_timeout": 0.2, **options}
        self._sockets: list[ServerConnection] = []
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    async def _main(self) -> None:
        self._loop, self.ended = asyncio.get_running_loop(), asyncio.Event()
        async with serve(self._serve, "127.0.0.1", 0, **self._options) as server:
            self.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            self._started.set()
            await self.ended.wait()

    async def _serve(self, socket: ServerConnection) -> None:
        self.num_connections += 1
        self._sockets.append(socket)
        with suppress(websockets.ConnectionClosed, ConnectionError):
            await self.handler(socket)

    def lose_connections(self) -> None:
        """Break all connections, as a network does."""
        self._loop.call_soon_threadsafe(lambda: [socket.transport.abort() for socket in self._sockets])

    def __enter__(self):
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *error):
        self._loop.call_soon_threadsafe(self.ended.set)
        self._thread.join(10)


async def hello(socket: ServerConnection, own: Hello = HELLO) -> Hello:
    """Exchange the first messages; returns the engine's."""
    [other] = protocol.read_from_engine(await socket.recv())
    await socket.send(protocol.encode([own]))
    return other


def answering(
    next_tokens: Callable[[list[int]], Sequence[int]], heard: list | None = None, knows_prefixes: bool = False
) -> Handler:
    """Serve with drafts that ``next_tokens`` knows for each sequence of tokens.

    With ``knows_prefixes`` what is behind a prefix is taken for all.
    """

    async def serve(socket: ServerConnection) -> None:
        await hello(socket)
        requests: dict[int, list[int]] = {}
        branches = iter(range(10**9))
        async for frame in socket:
            for message in protocol.read_from_engine(frame):
                if heard is not None:
                    heard.append(message)
                if isinstance(message, Open):
                    if message.prefix and not knows_prefixes:
                        await socket.send(protocol.encode([Missing(message.request)]))
                        continue
                    requests[message.request] = list(message.tokens)
                elif isinstance(message, Committed):
                    if message.request not in requests:
                        continue  # it was sent before the engine heard that the prefix is missing
                    assert message.position == len(requests[message.request])
                    requests[message.request] += message.tokens
                else:
                    requests.pop(message.request, None)
                    continue
                known = requests[message.request]
                tokens = list(next_tokens(known))[: message.ahead]
                if tokens:
                    at = len(known)
                    await socket.send(protocol.encode([Tail(message.request, next(branches), at, at, at, tokens)]))

    return serve


async def _open_request(socket: ServerConnection) -> Open:
    while True:
        for message in protocol.read_from_engine(await socket.recv()):
            if isinstance(message, Open):
                return message


async def _random_tails(socket: ServerConnection, opened: Open, chance: random.Random, vocabulary: int) -> None:
    """Tails with any numbers; most tokens are of the vocabulary."""
    at = len(opened.tokens)
    for _ in range(chance.randrange(1, 40)):
        numbers = [chance.choice([0, 1, at - 1, at, at + 1, at + 2, 2 * at]) for _ in range(3)]
        tokens = [chance.randrange(vocabulary + chance.choice([0, 0, 0, 50])) for _ in range(chance.randrange(1, 9))]
        await socket.send(protocol.encode([Tail(opened.request, chance.randrange(50), *map(abs, numbers), tokens)]))


async def _fitting_tails(socket: ServerConnection, opened: Open, chance: random.Random, vocabulary: int) -> None:
    """Random tokens in tails that are right in every other respect, for all that the engine commits."""
    branches = iter(range(10**9))
    known = len(opened.tokens)
    for _ in range(chance.randrange(1, 30)):
        tokens = [chance.randrange(vocabulary) for _ in range(8)]
        probabilities = bytes([255] * 8)
        await socket.send(
            protocol.encode([Tail(opened.request, next(branches), known, known, known, tokens, probabilities)])
        )
        for message in protocol.read_from_engine(await socket.recv()):
            if isinstance(message, Committed) and message.request == opened.request:
                known = message.position + len(message.tokens)


async def _flood(socket: ServerConnection, opened: Open, chance: random.Random, vocabulary: int) -> None:
    at = len(opened.tokens)
    frame = protocol.encode([Tail(opened.request, 0, at, at, at, [1])] * 50)
    for _ in range(2000):
        await socket.send(frame)


async def _garbage(socket: ServerConnection, opened: Open, chance: random.Random, vocabulary: int) -> None:
    frames = [
        chance.randbytes(chance.randrange(60)),
        "text",
        bytes(protocol.MAX_SERVER_FRAME + 1),
        msgspec.msgpack.encode([[4, opened.request, 0, 1, 1, 1, [1], [float("nan")]]]),
        msgspec.msgpack.encode([[4, opened.request, 0, 1, 1, 1, [2**40], b""]]),
        msgspec.msgpack.encode([[6, opened.request, "declined"]]),
        protocol.encode([HELLO]),
        protocol.encode([Tail(opened.request + 1, 0, 1, 1, 1, [1])]),
        b"\x91" * 5000,
        b"",
    ]
    await socket.send(chance.choice(frames))
    with suppress(TimeoutError):
        async with asyncio.timeout(0.02):
            await socket.recv()


async def _stall(socket: ServerConnection, opened: Open, chance: random.Random, vocabulary: int) -> None:
    await asyncio.sleep(0.02)


async def _abort(socket: ServerConnection, opened: Open, chance: random.Random, vocabulary: int) -> None:
    socket.transport.abort()


FAULTS = {
    "random tails": _random_tails,
    "random tokens": _fitting_tails,
    "flood": _flood,
    "garbage": _garbage,
    "stall": _stall,
    "abort": _abort,
}


def hostile(vocabulary: int, counts: dict[str, int], seed: int = 0) -> Handler:
    """Serve each connection with one fault after the other, and then close it; ``counts`` are those so far."""
    chance = random.Random(seed)

    async def serve(socket: ServerConnection) -> None:
        if chance.random() < 0.05:
            counts["no hello"] = counts.get("no hello", 0) + 1
            await socket.send(chance.choice([b"", b"\x90", protocol.encode([Hello(99, "", 1)])[:-2]]))
            return
        await hello(socket)
        opened = await _open_request(socket)
        for _ in range(chance.randrange(1, 4)):
            name = chance.choice([*FAULTS])
            counts[name] = counts.get(name, 0) + 1
            await FAULTS[name](socket, opened, chance, vocabulary)

    return serve


def wait_until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for a condition that another thread brings about."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.002)


def lying(vocabulary: int, counts: dict[str, int], seed: int = 0) -> Handler:
    """Answer everything that is committed with sure random tokens, and now and then with something invalid."""
    chance = random.Random(seed)

    def count(name: str) -> None:
        counts[name] = counts.get(name, 0) + 1

    async def serve(socket: ServerConnection) -> None:
        await hello(socket)
        known: dict[int, int] = {}
        branches = iter(range(10**9))
        invalid = 0
        async for frame in socket:
            for message in protocol.read_from_engine(frame):
                if not isinstance(message, Open | Committed):
                    known.pop(message.request, None)
                    continue
                known[message.request] = known.get(message.request, 0) + len(message.tokens)
                at, request = known[message.request], message.request
                tokens = [chance.randrange(vocabulary) for _ in range(chance.randrange(1, 1 + message.ahead))]
                tails = [Tail(request, next(branches), at, at, at, tokens, bytes([255] * len(tokens)))]
                count("lie")
                if invalid < 60 and chance.random() < 0.05:
                    invalid += 1
                    count("invalid")
                    tails.append(Tail(request, next(branches), at + 1, at + 1, at + 1, [vocabulary + 5]))
                await socket.send(protocol.encode(tails))
                if chance.random() < 0.002:
                    count("abort")
                    socket.transport.abort()

    return serve
