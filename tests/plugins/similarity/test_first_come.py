"""The queue as it would have been."""

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant_plugins.similarity.cost_model import LinearTime
from vllm_instant_plugins.similarity.fcfs_simulation import FcfsSimulation


def _by_hand(jobs, slots):
    free = [float("-inf")] * slots
    starts = []
    for arrival, service in jobs:
        start = max(arrival, heapq.heappop(free))
        starts.append(start)
        heapq.heappush(free, start + service)
    return starts


JOBS = st.lists(st.tuples(st.floats(0, 3), st.floats(0, 20)), min_size=1, max_size=40)


@given(JOBS, st.integers(1, 5), st.randoms())
def test_it_is_first_come_first_served_whatever_is_served_when(gaps, slots, random):
    """Services become known in any order; what is settled is forgotten; the answer stays the same."""
    jobs, now = [], 0.0
    for gap, service in gaps:
        now += gap
        jobs.append((now, service))
    queue = FcfsSimulation(slots)
    expected = np.array([service for _, service in jobs])
    open_jobs = set()
    for index, (arrival, _) in enumerate(jobs):
        queue.enter(index, arrival)
        open_jobs.add(index)
        while open_jobs and random.random() < 0.4:
            done = random.choice(sorted(open_jobs))
            open_jobs.remove(done)
            queue.served(done, jobs[done][1])
        indices, starts = queue.starts(expected)
        by_hand = _by_hand(jobs[: index + 1], slots)
        assert indices.tolist() == sorted(open_jobs)
        assert starts == pytest.approx([by_hand[i] for i in sorted(open_jobs)])


def test_settled_requests_are_forgotten():
    queue = FcfsSimulation(2)
    for number in range(5000):
        queue.enter(number % 3, float(number))
        queue.served(number % 3, 0.5)
    assert len(queue) == 0
    assert len(queue._arrival) == 256
    assert len(queue.latencies) == 512
    assert queue.latencies == pytest.approx(0.5)


def test_prices_are_learned_and_outliers_forgiven():
    random = np.random.default_rng(0)
    time = LinearTime([0.0, 0.001, 0.03])
    for number in range(300):
        prompt, output = random.integers(10, 800), random.integers(5, 300)
        seconds = (0.2 + 0.0004 * prompt + 0.012 * output) * random.normal(1, 0.03)
        time.observe(30.0 if number % 60 == 59 else seconds, 1.0, prompt, output)
    assert time.prices[2] == pytest.approx(0.012, rel=0.15)
    assert time.expected(1.0, 400, 100) == pytest.approx(0.2 + 0.16 + 1.2, rel=0.15)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 500), st.integers(1, 500)), max_size=30))
def test_prices_are_never_negative(measured):
    time = LinearTime([0.0, 0.001, 0.03])
    for seconds, prompt, output in measured:
        time.observe(seconds, 1.0, prompt, output)
    assert (time.prices >= 0).all()
    assert np.isfinite(time.prices).all()
