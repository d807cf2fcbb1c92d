from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant_loadtests.arrivals import due, traced

heights = st.floats(0, 50)
curves = st.lists(st.tuples(st.floats(0, 30), heights), min_size=1, max_size=6).map(lambda points: sorted(points))


def area(curve, seconds):
    points = [(0.0, curve[0][1]), *curve, (max(seconds, curve[-1][0]), curve[-1][1])]
    grid = np.linspace(0, seconds, 200_001)
    return float(np.trapezoid(np.interp(grid, [t for t, _ in points], [r for _, r in points]), grid))


@given(curves, st.floats(1, 40), st.sampled_from(["poisson", "gamma", "even"]), st.integers(0, 2**32))
def test_arrivals_are_in_order_and_inside_whatever_the_rate(curve, seconds, process, seed):
    times = due(curve, seconds, np.random.default_rng(seed), process)
    assert np.all(np.diff(times) >= 0)
    assert not len(times) or (times[0] >= 0 and times[-1] < seconds)


@given(curves, st.floats(1, 40))
def test_as_many_are_due_as_the_area_under_the_rate(curve, seconds):
    times = due(curve, seconds, np.random.default_rng(0), "even")
    assert abs(len(times) - area(curve, seconds)) <= 1.1


def test_a_step_of_the_rate_is_a_step():
    times = due([(0, 10.0), (5, 10.0), (5, 100.0), (6, 100.0), (6, 0.0)], 20, np.random.default_rng(1), "even")
    assert [int(np.sum((times >= a) & (times < b))) for a, b in ((0, 5), (5, 6), (6, 20))] == pytest.approx(
        [50, 100, 0], abs=1
    )


@pytest.mark.parametrize(
    ("process", "cv", "expected"), [("poisson", 9.0, 1.0), ("gamma", 2.0, 2.0), ("even", 9.0, 0.0)]
)
def test_gaps_vary_as_asked_for(process, cv, expected):
    gaps = np.diff(due(100.0, 300, np.random.default_rng(3), process, cv))
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(expected, abs=0.07)


def test_a_trace_starts_with_its_first_arrival_and_can_be_faster(tmp_path):
    file = tmp_path / "trace.txt"
    file.write_text("# seconds\n100.0\n104\n\n101.5\n130\n")
    assert traced(file, 10).tolist() == [0, 1.5, 4]
    assert traced(file, 10, speed=4).tolist() == [0, 0.375, 1.0, 7.5]


@pytest.mark.parametrize("text", ["", "1\nsoon\n"])
def test_a_trace_that_cannot_be_read_says_so(tmp_path, text):
    file = tmp_path / "trace.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"trace.txt .*one"):
        traced(file, 10)
