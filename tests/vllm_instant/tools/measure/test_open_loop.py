"""Open loop: requests are sent when they are due, and latencies count from then."""

import asyncio
import threading
import time

from fake_server import FakeServer, serving

from vllm_instant.tools.measure.open_loop import OpenLoopRequest, follow_all, send_open_loop
from vllm_instant.tools.measure.streaming_client import open_client


def _body(tokens):
    return {"model": "fake", "prompt": "x", "max_tokens": tokens}


def test_requests_do_not_wait_for_earlier_answers():
    """The server answers nothing before all five requests are there: a closed loop would never get an answer."""
    all_clients = threading.Barrier(5)
    with serving(FakeServer(before_stream=lambda: all_clients.wait(30))) as url:
        results = send_open_loop(url, [OpenLoopRequest(0.001 * number, _body(10), "slow") for number in range(5)])
    for number, result in enumerate(results):
        assert result.error is None
        assert (result.kind, result.due, result.tokens) == ("slow", 0.001 * number, 10)
        assert 0 <= result.late <= result.ttft <= result.ended


def test_each_request_is_sent_when_it_is_due():
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    async def send(url):
        async with open_client(url) as client:
            began = time.perf_counter() + 1000
            requests = [OpenLoopRequest(20.0 * number, _body(1)) for number in range(3)]
            return await follow_all(client, requests, began, sleep=sleep)

    with serving(FakeServer()) as url:
        results = asyncio.run(send(url))
    assert [round(wait, -1) for wait in waits] == [1000, 1020, 1040]
    # Sent early because the clock was skipped: latencies still count from when each was due.
    assert all(result.ttft < 0 for result in results)


def test_failures_are_noted_with_the_request():
    with serving(FakeServer(status=503)) as url:
        [refused] = send_open_loop(url, [OpenLoopRequest(0.0, _body(4))])
    [unreachable] = send_open_loop("http://127.0.0.1:9", [OpenLoopRequest(0.0, _body(4))])
    assert refused.error == "HTTP 503: the engine is dead"
    assert unreachable.error is not None
    assert "Connect" in unreachable.error


def test_a_client_that_leaves_keeps_what_arrived():
    with serving(FakeServer(step_tokens=2)) as url:
        [left] = send_open_loop(url, [OpenLoopRequest(0.0, _body(5000), leave_after=4)])
    assert left.left
    assert left.error is None
    assert 4 <= left.tokens < 5000
