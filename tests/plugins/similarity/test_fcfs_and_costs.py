"""The simulated first come, first served queue, and the linear cost model."""

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant_plugins.similarity.cost_model import LinearCostModel
from vllm_instant_plugins.similarity.fcfs_simulation import FcfsSimulation


def _reference(jobs, slots):
    free = [float("-inf")] * slots
    starts = []
    for arrival, service in jobs:
        start = max(arrival, heapq.heappop(free))
        starts.append(start)
        heapq.heappush(free, start + service)
    return starts


JOBS = st.lists(st.tuples(st.floats(0, 3), st.floats(0, 20)), min_size=1, max_size=40)


@given(JOBS, st.integers(1, 5), st.randoms())
def test_start_times_match_a_reference_whatever_the_order_of_measured_services(gaps, slots, random):
    """Service times become known in any order and settled requests are dropped; start times stay the same."""
    jobs, now = [], 0.0
    for gap, service in gaps:
        now += gap
        jobs.append((now, service))
    queue = FcfsSimulation(slots)
    expected = np.array([service for _, service in jobs])
    open_jobs = set()
    for index, (arrival, _) in enumerate(jobs):
        queue.add(index, arrival)
        open_jobs.add(index)
        while open_jobs and random.random() < 0.4:
            done = random.choice(sorted(open_jobs))
            open_jobs.remove(done)
            queue.set_service_time(done, jobs[done][1])
        indices, starts = queue.starts(expected)
        starts_of_reference = _reference(jobs[: index + 1], slots)
        assert indices.tolist() == sorted(open_jobs)
        assert starts == pytest.approx([starts_of_reference[i] for i in sorted(open_jobs)])


def test_settled_requests_are_dropped():
    queue = FcfsSimulation(2)
    for number in range(5000):
        queue.add(number % 3, float(number))
        queue.set_service_time(number % 3, 0.5)
    assert len(queue) == 0
    assert len(queue._arrival) == 256
    assert len(queue.latencies) == 512
    assert queue.latencies == pytest.approx(0.5)


def test_coefficients_are_learned_despite_outliers():
    random = np.random.default_rng(0)
    time = LinearCostModel([0.0, 0.001, 0.03])
    for number in range(300):
        prompt, output = random.integers(10, 800), random.integers(5, 300)
        seconds = (0.2 + 0.0004 * prompt + 0.012 * output) * random.normal(1, 0.03)
        time.observe(30.0 if number % 60 == 59 else seconds, 1.0, prompt, output)
    assert time.coefficients[2] == pytest.approx(0.012, rel=0.15)
    assert time.predict(1.0, 400, 100) == pytest.approx(0.2 + 0.16 + 1.2, rel=0.15)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 500), st.integers(1, 500)), max_size=30))
def test_coefficients_are_never_negative(measured):
    time = LinearCostModel([0.0, 0.001, 0.03])
    for seconds, prompt, output in measured:
        time.observe(seconds, 1.0, prompt, output)
    assert (time.coefficients >= 0).all()
    assert np.isfinite(time.coefficients).all()
