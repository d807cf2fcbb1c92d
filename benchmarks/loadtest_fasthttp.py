"""The other way to follow streams in Locust, for ``loadtest_capacity.py``: FastHttpUser, one event at a time."""

from __future__ import annotations

import json
import re
import time

import gevent
from locust import FastHttpUser, events, task

from vllm_instant_loadtests.load_driver import READING_SECONDS, TIMER_SECONDS

TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


class Reader(FastHttpUser):
    """Follows one answer and then does nothing."""

    network_timeout = 600
    connection_timeout = 60

    @task
    def follow(self):
        body = {"model": "mock", "prompt": "x", "max_tokens": 10_000, "stream": True}
        arrivals = []
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True) as answer:
            while event := answer._response.readline(b"\n\n"):
                if tokens := TOKENS.search(event):
                    arrivals.append((time.perf_counter(), int(tokens[1])))


def watch() -> None:
    """Say what share of its core this process uses and how late its timers are."""
    while True:
        used, began, worst = time.process_time(), time.perf_counter(), 0.0
        while time.perf_counter() - began < READING_SECONDS:
            due = time.perf_counter() + TIMER_SECONDS
            gevent.sleep(TIMER_SECONDS)
            worst = max(worst, time.perf_counter() - due)
        took = time.perf_counter() - began
        print(json.dumps({"cpu": (time.process_time() - used) / took, "late": worst}), flush=True)


@events.init.add_listener
def start(environment, **_):
    """With Locust."""
    gevent.spawn(watch)
