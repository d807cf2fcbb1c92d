"""Requests are sent when they are due, and latencies count from then."""

import time

import pytest
from fake_server import FakeServer, serving

from vllm_instant.tools.measure.open_loop import OpenLoopRequest, send_open_loop


def _body(tokens):
    return {"model": "fake", "prompt": "x", "max_tokens": tokens}


def test_a_slow_server_does_not_slow_the_load_down():
    """Each answer takes half a second; all are sent within a tenth, and followed at the same time."""
    with serving(FakeServer(step_seconds=0.05)) as url:
        began = time.perf_counter()
        followed = send_open_loop(url, [OpenLoopRequest(0.02 * number, _body(10), "slow") for number in range(5)])
        took = time.perf_counter() - began
    assert took < 1.5
    for number, request in enumerate(followed):
        assert request.error is None
        assert (request.kind, request.due, request.answer.tokens) == ("slow", 0.02 * number, 10)
        assert 0.04 < request.answer.ttft < 0.3
        assert 0.45 < request.ended < 1.2
        assert request.late < 0.1


def test_several_tokens_in_one_event_are_several_tokens():
    with serving(FakeServer(step_seconds=0.03, step_tokens=4)) as url:
        [request] = send_open_loop(url, [OpenLoopRequest(0.0, _body(12))])
    assert request.answer.tokens == 12
    assert len(request.answer.inter_token_latencies()) == 8
    assert request.answer.inter_token_latencies().mean() == pytest.approx(0.03 / 4, rel=0.5)


def test_failures_are_noted_with_the_request():
    with serving(FakeServer(status=503)) as url:
        [refused] = send_open_loop(url, [OpenLoopRequest(0.0, _body(4))])
    [nobody] = send_open_loop("http://127.0.0.1:9", [OpenLoopRequest(0.0, _body(4))])
    assert refused.error == "HTTP 503: the engine is dead"
    assert nobody.error is not None
    assert "Connect" in nobody.error
