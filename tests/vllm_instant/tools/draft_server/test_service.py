"""A draft server with a given model, asked by the drafter's own connection and by engines that misbehave."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import httpx
import numpy as np
import pytest
import websockets
from draft_servers import wait_until
from websockets.asyncio.client import connect

from vllm_instant import DraftRequest
from vllm_instant.remote import protocol
from vllm_instant.remote.prefixes import block_hashes
from vllm_instant.remote.protocol import Close, Committed, Hello, Missing, Open, Tail
from vllm_instant.tools.draft_server.drafting import Guess
from vllm_instant.tools.draft_server.server import Endpoint, is_loopback, read_tokens, serving
from vllm_instant.tools.draft_server.service import DraftServerLimits, DraftService
from vllm_instant_plugins.remote.connection import DraftServerConnection, ServerAddress
from vllm_instant_plugins.remote.drafter import RemoteDrafter

OWN = Hello(protocol.VERSION, "aa", 100)


class Counting:
    """A model that counts up."""

    max_tokens, vocab_size, max_parallel = 50, 100, 1

    def __init__(self):
        self.released = []
        self.owners = set()
        self.gate = threading.Event()
        self.gate.set()

    def draft(self, request, owner, sequence, count, vocab_size):
        self.gate.wait(10)
        self.owners.add(owner)
        return [Guess((int(sequence[-1]) + step) % vocab_size, 0.9, 0, 0.05) for step in range(1, count + 1)]

    def release(self, request):
        self.released.append(request)


@contextmanager
def running(model=None, tokens=(), **limits):
    """A service and its address."""
    started, ended = threading.Event(), None

    async def main():
        nonlocal ended
        ended = asyncio.Event()
        found.append(DraftService(model or Counting(), OWN, DraftServerLimits(**limits)))
        async with serving(Endpoint("127.0.0.1", 0, tokens), found[0]) as server:
            found.append(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
            loops.append(asyncio.get_running_loop())
            started.set()
            await ended.wait()

    found, loops = [], []
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert started.wait(10)
    try:
        yield found
    finally:
        loops[0].call_soon_threadsafe(ended.set)
        thread.join(10)
        assert not thread.is_alive()


def value(service, name, **labels):
    return service.metrics.registry.get_sample_value(f"vllm_instant_draft_server_{name}", labels)


def request(request_id, tokens):
    return DraftRequest(request_id, np.array(tokens, np.int32), 2, 4, "tenant")


def test_engines_get_drafts_for_their_requests_and_nothing_is_left():
    model = Counting()
    with running(model) as (service, address):
        connections = [DraftServerConnection(ServerAddress(f"ws://{address}"), OWN, 4) for _ in range(2)]
        assert [one.start(10) for one in connections] == [None, None]
        drafters = [RemoteDrafter(one, 100, 4) for one in connections]
        for number, drafter in enumerate(drafters):
            for start in (10, 30):
                name = f"r{start}"
                tokens = [number, start]
                while len(tokens) < 20:
                    [draft] = drafter.propose([request(name, tokens)])
                    assert list(draft.token_ids) == [tokens[-1] + step for step in range(1, len(draft.token_ids) + 1)]
                    tokens += [tokens[-1] + step for step in range(1, len(draft.token_ids) + 2)]
                    if not draft.token_ids:
                        wait_until(lambda name=name, number=number: connections[number].published.get(name))
                drafter.forget(name)
        wait_until(lambda: value(service, "requests") == 0)
        assert value(service, "clients") == 2
        assert value(service, "accepted_tokens_total") > 20
        assert value(service, "committed_tokens_total") >= value(service, "accepted_tokens_total")
        # The engine's token and the request's tenant separate what caches may share.
        assert {tenant for _, tenant in model.owners} == {protocol.tenant_of("tenant")}
        for one in connections:
            one.close()
        wait_until(lambda: value(service, "clients") == 0)
        wait_until(lambda: len(model.released) >= 4)


async def ask(address, *messages, answers=1, **options):
    """Send a hello and messages; returns the answers behind the server's hello, and the code of the close."""
    received = []
    async with connect(
        f"ws://{address}{protocol.PATH}", subprotocols=[protocol.SUBPROTOCOL], max_size=None, **options
    ) as socket:
        with suppress(websockets.ConnectionClosed):
            for message in messages:
                await socket.send(message if isinstance(message, bytes) else protocol.encode([message]))
            async with asyncio.timeout(10):
                while len(received) <= answers:
                    received += protocol.read_from_server(await socket.recv())
            return received[1:], None
    return received[1:], socket.close_code


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([b"\xc1"], protocol.VIOLATION),
        ([Open(1, [1], 4)], protocol.VIOLATION),
        ([Hello(protocol.VERSION, "aa", 1)], protocol.VIOLATION),
        ([Hello(9, "aa", 100)], protocol.MISMATCH),
        ([Hello(protocol.VERSION, "bb", 100)], protocol.MISMATCH),
        ([OWN, OWN], protocol.VIOLATION),
        ([OWN, Tail(1, 0, 1, 1, 1, [1])], protocol.VIOLATION),
        ([OWN, Open(1, [1], 0), Open(1, [1], 0)], protocol.VIOLATION),
        ([OWN, Open(1, [1], 0), Committed(1, 5, [1], 0)], protocol.VIOLATION),
        ([OWN, b""], protocol.VIOLATION),
        ([OWN, *[protocol.encode([Committed(7, 0, [1], 0)] * 1000)] * 12], protocol.VIOLATION),
    ],
    ids=[
        "garbage",
        "no hello",
        "no vocabulary",
        "another version",
        "another tokenizer",
        "two hellos",
        "a tail",
        "opened twice",
        "a gap",
        "an empty frame",
        "a flood",
    ],
)
def test_an_engine_that_breaks_the_protocol_is_left_alone(messages, code):
    with running() as (service, address):
        _, found = asyncio.run(ask(address, *messages, answers=9))
        assert found == code
        # Others are served.
        [tail], found = asyncio.run(ask(address, OWN, Open(1, [5], 2)))
        assert (tail.tokens, found) == ([6, 7], None)
        wait_until(lambda: value(service, "requests") == 0)


def test_a_prefix_that_was_sent_before_need_not_be_sent_again():
    class Long(Counting):
        max_tokens = 1000

    tokens = [5] * 130
    name, second = block_hashes(tokens, "t")[1], block_hashes([5] * 128 + [9] * 64, "t")[-1]
    with running(Long(), ["one", "two"]) as (service, address):

        def of(token, *messages, answers=1):
            headers = {"Authorization": f"Bearer {token}"}
            return asyncio.run(ask(address, OWN, *messages, answers=answers, additional_headers=headers))

        [tail], _ = of("one", Open(1, tokens, 2, "t"))
        assert (tail.base, tail.tokens) == (130, [6, 7])
        [tail], _ = of("one", Open(1, [8], 2, "t", name))
        assert (tail.base, tail.tokens) == (129, [9, 10])
        # What was committed meanwhile belongs to the next turn's prefix as well.
        of("one", Open(1, [], 0, "t", name), Committed(1, 128, [9] * 64, 0), Close(1), answers=0)
        wait_until(lambda: value(service, "requests") == 0)
        [tail], _ = of("one", Open(1, [8], 2, "t", second))
        assert (tail.base, tail.tokens) == (193, [9, 10])
        # Neither another engine's tokens nor unknown ones are found.
        for token, prefix in (("two", name), ("one", b"x" * 16)):
            [missing], _ = of(token, Open(3, [8], 2, "t", prefix))
            assert missing == Missing(3)
        assert value(service, "requests") == 0


def test_a_model_that_fails_for_one_request_serves_the_others():
    class Failing(Counting):
        def draft(self, request, owner, sequence, *arguments):
            if sequence[0] == 66:
                raise IndexError("no such token")
            return super().draft(request, owner, sequence, *arguments)

    with running(Failing()) as (service, address):
        answers, _ = asyncio.run(ask(address, OWN, Open(1, [66], 4)))
        assert [(one.request, one.reason) for one in answers] == [(1, "the model failed")]
        wait_until(lambda: value(service, "requests") == 0)
        [tail], _ = asyncio.run(ask(address, OWN, Open(1, [5], 2)))
        assert tail.tokens == [6, 7]


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_model_that_batches_gets_several_requests_at_once(parallel):
    class Batching(Counting):
        max_parallel = parallel
        running, most = 0, 0
        lock = threading.Lock()

        def draft(self, *arguments):
            with self.lock:
                self.running += 1
                self.most = max(self.most, self.running)
            try:
                return super().draft(*arguments)
            finally:
                with self.lock:
                    self.running -= 1

    model = Batching()
    model.gate.clear()

    async def open_all(address):
        async with connect(f"ws://{address}{protocol.PATH}", subprotocols=[protocol.SUBPROTOCOL]) as socket:
            await socket.send(protocol.encode([OWN]))
            await socket.send(protocol.encode([Open(number, [number], 4) for number in range(1, 6)]))
            await asyncio.to_thread(wait_until, lambda: model.running == parallel)
            model.gate.set()
            tails = []
            async with asyncio.timeout(10):
                while {tail.request for tail in tails} != {1, 2, 3, 4, 5}:
                    tails += [m for m in protocol.read_from_server(await socket.recv()) if isinstance(m, Tail)]
            return tails

    with running(model) as (_, address):
        tails = asyncio.run(open_all(address))
    assert all(tail.tokens[0] == tail.request + 1 for tail in tails if tail.position == 1)
    assert model.most == parallel


def test_it_ends_with_live_requests(caplog):
    with running() as (service, address):
        connection = DraftServerConnection(ServerAddress(f"ws://{address}"), OWN, 4)
        assert connection.start(10) is None
        RemoteDrafter(connection, 100, 4).propose([request("a", [1, 2])])
        wait_until(lambda: value(service, "requests") == 1)
    connection.close()
    assert [record for record in caplog.records if record.exc_info] == []


def test_limits_refuse_what_is_too_much():
    with running(max_requests_per_client=1) as (service, address):
        answers, _ = asyncio.run(ask(address, OWN, Open(1, [1], 0), Open(2, [1], 4)))
        assert [(one.request, one.reason) for one in answers] == [(2, "at most 1 requests per engine")]
        answers, _ = asyncio.run(ask(address, OWN, Open(1, [1] * 50, 4)))
        assert [(one.request, one.reason) for one in answers] == [(1, "requests have 1 to 49 tokens")]
        answers, _ = asyncio.run(ask(address, OWN, Open(1, [1] * 40, 0), Committed(1, 40, [1] * 10, 4)))
        assert [(one.request, one.reason) for one in answers] == [(1, "requests have at most 50 tokens")]
        below = "token ids must be below 100"
        answers, _ = asyncio.run(ask(address, OWN, Open(1, [100], 4)))
        assert [(one.request, one.reason) for one in answers] == [(1, below)]
        answers, _ = asyncio.run(ask(address, OWN, Open(1, [1], 0), Committed(1, 1, [100], 4)))
        assert [(one.request, one.reason) for one in answers] == [(1, below)]
        assert value(service, "refused_total", limit="requests") == 5
    with running(max_requests=0) as (_, address):
        assert asyncio.run(ask(address, OWN, Open(1, [1], 0)))[0][0].reason == "at most 0 requests"
    with running(max_clients=0) as (service, address):
        assert asyncio.run(ask(address, OWN))[1] == protocol.OVERLOADED
        assert value(service, "refused_total", limit="clients") == 1


def test_tokens_paths_and_metrics():
    with running(tokens=("first", "second")) as (_, address):
        for headers, status in (({}, 401), ({"Authorization": "Bearer third"}, 401)):
            with pytest.raises(websockets.InvalidStatus) as caught:
                asyncio.run(ask(address, OWN, additional_headers=headers))
            assert caught.value.response.status_code == status
            assert httpx.get(f"http://{address}/metrics", headers=headers).status_code == status
        right = {"Authorization": "Bearer second"}
        [tail], _ = asyncio.run(ask(address, OWN, Open(1, [5], 2), additional_headers=right))
        assert tail.tokens == [6, 7]
        text = httpx.get(f"http://{address}/metrics", headers=right).text
        assert "vllm_instant_draft_server_drafted_tokens_total 2.0" in text
        assert httpx.get(f"http://{address}/v1/other", headers=right).status_code == 404
        # A page in a browser names its origin.
        with pytest.raises(websockets.InvalidStatus):
            asyncio.run(ask(address, OWN, additional_headers=right, origin="http://127.0.0.1"))


def test_a_draft_that_is_ready_after_its_request_has_ended_is_not_sent():
    model = Counting()
    model.gate.clear()
    with running(model) as (service, address):

        async def leave():
            async with connect(f"ws://{address}{protocol.PATH}", subprotocols=[protocol.SUBPROTOCOL]) as socket:
                await socket.send(protocol.encode([OWN]))
                await socket.recv()
                await socket.send(protocol.encode([Open(1, [5], 4)]))
                await asyncio.to_thread(wait_until, lambda: value(service, "requests") == 1)
                await socket.send(protocol.encode([protocol.Close(1)]))
                await asyncio.to_thread(wait_until, lambda: value(service, "requests") == 0)
                model.gate.set()
                await asyncio.to_thread(wait_until, lambda: len(model.released) >= 1)

        asyncio.run(leave())
        assert value(service, "drafted_tokens_total") == 0


def test_drafts_of_several_requests_travel_in_one_frame(monkeypatch):
    monkeypatch.setattr("vllm_instant.tools.draft_server.service.GATHER_SECONDS", 0.5)

    async def first_frame(address):
        async with connect(f"ws://{address}{protocol.PATH}", subprotocols=[protocol.SUBPROTOCOL]) as socket:
            await socket.send(protocol.encode([OWN]))
            await socket.recv()
            await socket.send(protocol.encode([Open(number, [5], 4) for number in (1, 2, 3)]))
            async with asyncio.timeout(10):
                return protocol.read_from_server(await socket.recv())

    with running() as (_, address):
        tails = asyncio.run(first_frame(address))
    assert {tail.request for tail in tails} == {1, 2, 3}


def test_token_files_and_addresses(tmp_path):
    file = tmp_path / "tokens"
    with pytest.raises(ValueError, match="cannot be read"):
        read_tokens(file)
    file.write_text("# none\n\n")
    with pytest.raises(ValueError, match="has no token"):
        read_tokens(file)
    file.write_text("# engine 1\nabc\n\n  def \n")
    assert read_tokens(file) == ["abc", "def"]
    assert all(map(is_loopback, ("localhost", "127.0.0.2", "::1")))
    assert not any(map(is_loopback, ("", "10.0.0.1", "example.com")))


def test_the_command_drafts_until_it_is_told_to_end(demo_pair):
    fingerprint = protocol.tokenizer_fingerprint(str(demo_pair.target))
    command = [sys.executable, "-m", "vllm_instant.tools.cli", "draft-server", str(demo_pair.draft), "--port", "0"]
    environment = {**os.environ, protocol.TOKEN_VARIABLE: "of the environment"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            url = server.stdout.readline().split()[-1]
            address = ServerAddress(url, "of the environment")
            connection = DraftServerConnection(address, Hello(protocol.VERSION, fingerprint, 4096), 4)
            assert connection.start(10) is None
            drafter = RemoteDrafter(connection, 4096, 4)
            drafter.propose([request("a", [5, 6, 7])])
            wait_until(lambda: connection.published)
            connection.close()
        finally:
            server.send_signal(signal.SIGTERM)
            _, errors = server.communicate(timeout=20)
    assert server.returncode == 0
    assert "Traceback" not in errors


def test_an_open_port_needs_a_token():
    result = subprocess.run(
        [sys.executable, "-m", "vllm_instant.tools.cli", "draft-server", "no-model", "--host", "example.com"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("vllm-instant: draft-server: --host example.com needs --token-file")
