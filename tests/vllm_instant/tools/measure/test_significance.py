"""When a row may say better or worse: never for luck, always for what is there."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from simulated_verdicts import simulated_verdicts

from vllm_instant.tools.measure.significance import (
    Contrast,
    difference_contrast,
    exact_contrast,
    ratio_contrast,
    resample_rounds,
)
from vllm_instant.tools.measure.statistics import Estimate

NOTHING = Estimate(1.0, 0.99, 1.01)


def _mean(samples):
    return float(samples.mean())


def _rounds(*values):
    return resample_rounds([np.array([float(value)]) for value in values], _mean)


def _contrast(low, high, better="higher", threshold=1.1):
    certain = Estimate(math.sqrt(low * high), low, high)
    return Contrast("ratio", better, certain, certain, NOTHING, threshold)


class TestTheRule:
    @pytest.mark.parametrize(
        ("low", "high", "better", "verdict"),
        [
            (1.2, 1.4, "higher", "better"),
            (1.2, 1.4, "lower", "worse"),
            (0.98, 1.7, "higher", "no difference"),
            (1.05, 1.13, "higher", "no difference"),
            (0.7, 0.8, "lower", "better"),
            (0.7, 0.8, "higher", "worse"),
            (0.6, 1.01, "higher", "no difference"),
            (0.9, 0.95, "higher", "no difference"),
            (0.7, 0.8, "same", "worse"),
            (1.2, 1.3, "same", "worse"),
        ],
    )
    def test_certain_and_beyond_the_threshold(self, low, high, better, verdict):
        assert _contrast(low, high, better).verdict == verdict

    @given(st.floats(0.2, 5), st.floats(0.0, 0.5), st.floats(1.0, 1.5))
    def test_swapping_the_sides_swaps_the_verdict(self, centre, reach, threshold):
        low, high = centre * math.exp(-reach), centre * math.exp(reach)
        assume(abs(centre * threshold - 1) > 1e-9 < abs(centre / threshold - 1))
        swapped = {"better": "worse", "worse": "better", "no difference": "no difference"}
        there = _contrast(low, high, threshold=threshold).verdict
        assert _contrast(1 / high, 1 / low, threshold=threshold).verdict == swapped[there]

    def test_a_second_stock_server_that_differs_as_much_silences_the_row(self):
        stock, again, ours = _rounds(10, 10.1, 9.9), _rounds(13, 13.1, 12.9), _rounds(14, 14.2, 13.9)
        contrast = ratio_contrast(ours, stock, again, better="higher", margin=0.05, comparisons=1)
        assert contrast.threshold > 1.3
        assert contrast.verdict == "no difference"
        calm = ratio_contrast(ours, stock, _rounds(10.1, 10, 9.9), better="higher", margin=0.05, comparisons=1)
        assert calm.threshold < 1.1
        assert calm.verdict == "better"

    def test_more_rows_ask_for_more(self):
        arms = [_rounds(10, 11, 10, 11), _rounds(11, 10, 11, 10), _rounds(13, 13.5, 13.5, 13)]
        few, many = (
            ratio_contrast(arms[2], arms[0], arms[1], better="higher", margin=0.0, comparisons=count)
            for count in (1, 1000)
        )
        assert many.certain.low < few.certain.low
        assert few.effect == many.effect

    def test_drift_that_all_arms_share_is_no_noise(self):
        drift = (1, 2, 4, 8)
        stock, ours = _rounds(*drift), _rounds(*(1.3 * speed for speed in drift))
        contrast = ratio_contrast(ours, stock, stock, better="higher", margin=0.05, comparisons=20)
        assert (contrast.certain.low, contrast.certain.high) == pytest.approx((1.3, 1.3))
        assert contrast.verdict == "better"

    def test_the_noise_of_the_stock_servers_counts_even_if_ours_was_lucky(self):
        """Ours beside their mean looks calm when their noises cancel; the gap between them shows it."""
        stock, again = _rounds(10, 14, 10, 14), _rounds(14, 10, 14, 10)
        contrast = ratio_contrast(_rounds(17, 17, 17, 17), stock, again, better="higher", margin=0.05, comparisons=20)
        assert contrast.verdict == "no difference"

    def test_zero_has_no_ratio(self):
        zero = _rounds(0, 0, 0)
        assert (
            ratio_contrast(zero, _rounds(1, 2, 3), _rounds(1, 2, 3), better="higher", margin=0.1, comparisons=1) is None
        )

    def test_differences_and_quantities_without_noise(self):
        divergence, floor = Estimate(0.5, 0.4, 0.6), Estimate(0.0, -0.001, 0.002)
        assert difference_contrast(divergence, divergence, floor, better="same", margin=0.01).verdict == "worse"
        assert difference_contrast(floor, floor, floor, better="same", margin=0.01).verdict == "no difference"
        assert exact_contrast(50.0, 100.0, 100.0, better="lower", margin=0.01).verdict == "better"
        assert exact_contrast(100.5, 100.0, 100.0, better="lower", margin=0.01).verdict == "no difference"

    def test_it_survives_json(self):
        contrast = _contrast(1.2, 1.4)
        plain = contrast.plain()
        assert plain["verdict"] == "better"
        assert Contrast.read(plain) == contrast


class TestSinceAnEarlierRun:
    def test_a_loss_of_what_was_gained_is_worse(self):
        assert _contrast(1.0, 1.02).since(_contrast(1.5, 1.52)).verdict == "worse"
        assert _contrast(1.5, 1.52).since(_contrast(1.0, 1.02)).verdict == "better"

    def test_the_same_is_no_difference_and_luck_and_errors_of_both_runs_count(self):
        change = _contrast(1.4, 1.6, threshold=1.2).since(_contrast(1.4, 1.6, threshold=1.05))
        assert change.verdict == "no difference"
        assert 1.2 < change.threshold < 1.2 * 1.05
        assert change.certain.high > 1.6 / 1.5


class TestLuck:
    """Processes that differ by 2.5 % (standard deviation) for life, a machine that drifts, turns with 2.5 % noise."""

    @pytest.mark.parametrize("starts", [1, 2])
    def test_equal_servers_get_no_verdict(self, starts):
        runs = [simulated_verdicts(0.0, starts=starts, rounds=6, seed=seed, rows=4) for seed in range(60)]
        assert sum(set(run) != {"no difference"} for run in runs) <= 3

    def test_one_process_out_of_luck_is_outvoted_by_the_next(self):
        """Ten percent between two processes of one kind have been seen."""
        runs = [simulated_verdicts(0.0, starts=2, rounds=6, seed=seed, rows=1, hit=-0.1) for seed in range(40)]
        assert sum(run == ["no difference"] for run in runs) >= 38

    @pytest.mark.parametrize(
        ("effect", "starts", "rounds", "least"),
        [(0.3, 1, 6, 38), (0.3, 2, 6, 39), (-0.3, 1, 6, 38), (0.1, 2, 6, 20), (0.1, 3, 9, 32), (-0.1, 3, 9, 32)],
    )
    def test_what_is_there_is_found(self, effect, starts, rounds, least):
        runs = [simulated_verdicts(effect, starts=starts, rounds=rounds, seed=seed, rows=1) for seed in range(40)]
        assert sum(run == ["better" if effect > 0 else "worse"] for run in runs) >= least
