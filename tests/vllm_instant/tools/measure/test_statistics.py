"""Bootstrap intervals of medians and ratios."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant.tools.measure.statistics import estimate, median_interval, ratio_interval


class TestIntervals:
    @given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=30))
    def test_the_median_lies_between_the_bounds(self, values):
        interval = median_interval(values, draws=200)
        rounding = 1e-12 * max(values)
        assert min(values) - rounding <= interval.low <= interval.high <= max(values) + rounding
        assert interval.median == pytest.approx(np.median(values))

    def test_coverage_is_near_what_is_claimed(self):
        generator = np.random.default_rng(0)
        hits = 0
        for _ in range(200):
            interval = median_interval(generator.normal(5, 1, 40), draws=400)
            hits += interval.low <= 5 <= interval.high
        assert 0.88 <= hits / 200 <= 0.995

    def test_drift_between_rounds_cancels_in_ratios(self):
        drift = np.linspace(1, 10, 20)
        interval = ratio_interval(1.1 * drift, drift)
        assert (interval.low, interval.high) == pytest.approx((1.1, 1.1))

    def test_arms_of_different_length(self):
        with pytest.raises(ValueError, match="2 rounds of one arm, 1 of the other"):
            ratio_interval([1, 2], [1])

    def test_no_values_are_an_error(self):
        with pytest.raises(ValueError, match="no values"):
            median_interval([])

    def test_one_value_has_no_width(self):
        interval = median_interval([3.0])
        assert (interval.low, interval.median, interval.high) == (3.0, 3.0, 3.0)


class TestEstimates:
    def test_rows_are_resampled_as_a_whole(self):
        """The columns are proportional in every row: their ratio does not vary."""
        rows = np.random.default_rng(0).uniform(1, 2, (20, 1)) * np.array([1.0, 3.0])
        found = estimate(rows, lambda sums: sums[:, 1] / sums[:, 0])
        assert (found.low, found.mean, found.high) == pytest.approx((3.0, 3.0, 3.0))

    def test_a_mean_has_the_width_of_its_standard_error(self):
        rows = np.random.default_rng(0).normal(5, 1, (100, 1))
        found = estimate(rows, lambda sums: sums[:, 0] / 100)
        assert found.high - found.low == pytest.approx(2 * 1.96 * rows.std() / 10, rel=0.15)
