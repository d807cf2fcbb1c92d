"""A draft server that replays recorded drafts at a set pace, behind a network that delays, as a process of its own.

    python benchmarks/remote_replay.py --answers FILE

The server is that of ``vllm-instant draft-server`` with a model that sleeps instead of computing, so that it takes next
to nothing of the cores on which the engine is measured. Settings arrive as lines of JSON on standard input; each is
answered by a line with the bytes that have passed so far, in both directions, WebSocket frames included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant.remote.protocol import VERSION, Hello
from vllm_instant.tools.draft_server.drafting import Guess
from vllm_instant.tools.draft_server.server import Endpoint, serving
from vllm_instant.tools.draft_server.service import DraftServerLimits, DraftService

ORACLE, TRAINED = "oracle", "trained"


@dataclass(frozen=True)
class Link:
    """Settings of the network and of the drafts; times in milliseconds."""

    drafts: str = ORACLE
    delay_ms: float = 0.0
    """In each direction."""
    jitter_ms: float = 0.0
    """A message is delayed by up to this much more; messages keep their order."""
    stall_every_ms: float = 0.0
    """A stall begins so often; 0 for none."""
    stall_ms: float = 0.0
    """Duration of a stall, in which nothing arrives, as while a lost packet is sent again."""
    pace_ms: float = 1.0
    """Time per drafted token, over all requests."""


class ReplayModel:
    """Drafts from recorded answers.

    Args:
        recorded: For each prompt ``prompt`` and ``answer``, token ids, and what the draft model says after each prefix
            of the two that ends in the answer: ``tokens`` and ``probabilities``.

    """

    max_tokens = vocab_size = 1 << 20
    max_parallel = 1

    def __init__(self, recorded: Sequence[dict[str, Any]]) -> None:
        self.link = Link()
        self._of_prompt = {tuple(one["prompt"]): one for one in recorded}
        self._lengths = sorted({len(one["prompt"]) for one in recorded})

    def draft(
        self, request: Hashable, owner: Hashable, sequence: npt.NDArray[np.int32], count: int, vocab_size: int
    ) -> list[Guess]:
        """What is recorded behind ``sequence``; random tokens behind an answer that was never given."""
        time.sleep(1e-3 * self.link.pace_ms * count)
        tokens = sequence.tolist()
        found = next((one for n in self._lengths if (one := self._of_prompt.get(tuple(tokens[:n]))) is not None), None)
        done = None
        if found is not None:
            done = len(tokens) - len(found["prompt"])
            if tokens[len(found["prompt"]) :] != found["answer"][:done]:
                done = None
        guesses = []
        for _ in range(count):
            guess = self._guess(found, done, vocab_size)
            if found is None or done is None or done >= len(found["answer"]) or guess.token != found["answer"][done]:
                done = None
            else:
                done += 1
            guesses.append(guess)
        return guesses

    def _guess(self, found: dict[str, Any] | None, done: int | None, vocab_size: int) -> Guess:
        if found is None or done is None or done >= len(found["answer"]):
            return Guess(random.randrange(vocab_size), 0.3, 0, 0.0)
        if self.link.drafts == ORACLE:
            return Guess(found["answer"][done], 0.98, 0, 0.0)
        return Guess(found["tokens"][done], found["probabilities"][done], 0, 0.0)

    def release(self, request: Hashable) -> None:
        """Nothing is kept."""


class DelayedLink:
    """Forwards connections to a port, each piece later.

    Args:
        port: Where to.

    """

    def __init__(self, port: int) -> None:
        self.link = Link()
        self.num_bytes = {"up": 0, "down": 0}
        self._port = port

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection until either end closes."""
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        ways = [
            asyncio.create_task(self._forward(reader, far_writer, "up")),
            asyncio.create_task(self._forward(far_reader, writer, "down")),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (writer, far_writer):
            end.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sender = asyncio.create_task(self._deliver(on_the_way, writer))
        try:
            due = 0.0
            while piece := await reader.read(1 << 16):
                self.num_bytes[way] += len(piece)
                due = max(due, self._due(time.monotonic()))
                on_the_way.put_nowait((due, piece))
        finally:
            sender.cancel()

    async def _deliver(self, on_the_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due, piece = await on_the_way.get()
            delay = due - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            writer.write(piece)

    def _due(self, now: float) -> float:
        link = self.link
        due = now + 1e-3 * (link.delay_ms + random.uniform(0.0, link.jitter_ms))
        if link.stall_every_ms:
            into = (1e3 * due) % link.stall_every_ms
            if into < link.stall_ms:
                due += 1e-3 * (link.stall_ms - into)
        return due


async def run(recorded: Sequence[dict[str, Any]], vocab_size: int) -> None:
    """Serve until standard input ends."""
    model = ReplayModel(recorded)
    service = DraftService(
        model, Hello(VERSION, "", vocab_size), DraftServerLimits(max_messages_per_second=1e6, burst_tokens=8)
    )
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    async with serving(Endpoint(port=0), service) as server:
        proxy = DelayedLink(server.sockets[0].getsockname()[1])
        async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as listener:

            def follow() -> None:
                for line in sys.stdin:
                    model.link = proxy.link = Link(**json.loads(line))
                    print(json.dumps(proxy.num_bytes), flush=True)
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(ended.set)

            print(json.dumps({"port": listener.sockets[0].getsockname()[1]}), flush=True)
            threading.Thread(target=follow, daemon=True).start()
            await ended.wait()


def settings(link: Link) -> str:
    """A line that chooses these settings."""
    return json.dumps(asdict(link)) + "\n"


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    options = parser.parse_args()
    with open(options.answers) as file:
        recorded = json.load(file)
    asyncio.run(run(recorded, options.vocab_size))


if __name__ == "__main__":
    main()
