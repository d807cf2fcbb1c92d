"""When a row is better, worse, the same or undecided: luck alone decides nothing, real differences are found."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from simulated_verdicts import simulated_contrasts, simulated_verdicts

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
            (0.98, 1.7, "higher", "undecided"),
            (1.05, 1.13, "higher", "undecided"),
            (0.7, 0.8, "lower", "better"),
            (0.7, 0.8, "higher", "worse"),
            (0.6, 1.01, "higher", "undecided"),
            (0.9, 0.95, "higher", "undecided"),
            (0.92, 0.99, "higher", "same"),
            (0.92, 1.08, "lower", "same"),
            (0.92, 1.08, "same", "same"),
            (0.95, 1.12, "higher", "undecided"),
            (0.7, 0.8, "same", "worse"),
            (1.2, 1.3, "same", "worse"),
        ],
    )
    def test_each_combination_of_interval_and_direction_has_its_verdict(self, low, high, better, verdict):
        assert _contrast(low, high, better).verdict == verdict

    @given(st.floats(0.2, 5), st.floats(0.0, 0.5), st.floats(1.0, 1.5))
    def test_swapping_the_sides_swaps_the_verdict(self, centre, reach, threshold):
        low, high = centre * math.exp(-reach), centre * math.exp(reach)
        assume(abs(centre * threshold - 1) > 1e-9 < abs(centre / threshold - 1))
        swapped = {"better": "worse", "worse": "better", "same": "same", "undecided": "undecided"}
        there = _contrast(low, high, threshold=threshold).verdict
        assert _contrast(1 / high, 1 / low, threshold=threshold).verdict == swapped[there]

    def test_a_second_baseline_server_that_differs_as_much_leaves_the_row_undecided(self):
        baseline, again, ours = _rounds(10, 10.1, 9.9), _rounds(13, 13.1, 12.9), _rounds(14, 14.2, 13.9)
        contrast = ratio_contrast(ours, baseline, again, better="higher", margin=0.05, comparisons=1)
        assert contrast.threshold > 1.3
        assert contrast.verdict == "undecided"
        calm = ratio_contrast(ours, baseline, _rounds(10.1, 10, 9.9), better="higher", margin=0.05, comparisons=1)
        assert calm.threshold < 1.1
        assert calm.verdict == "better"

    def test_more_rows_widen_the_certain_interval(self):
        arms = [_rounds(10, 11, 10, 11), _rounds(11, 10, 11, 10), _rounds(13, 13.5, 13.5, 13)]
        few, many = (
            ratio_contrast(arms[2], arms[0], arms[1], better="higher", margin=0.0, comparisons=count)
            for count in (1, 1000)
        )
        assert many.certain.low < few.certain.low
        assert few.effect == many.effect

    def test_drift_that_all_arms_share_is_no_noise(self):
        drift = (1, 2, 4, 8)
        baseline, ours = _rounds(*drift), _rounds(*(1.3 * speed for speed in drift))
        contrast = ratio_contrast(ours, baseline, baseline, better="higher", margin=0.05, comparisons=20)
        assert (contrast.certain.low, contrast.certain.high) == pytest.approx((1.3, 1.3))
        assert contrast.verdict == "better"

    def test_the_noise_of_the_baseline_servers_counts_even_if_ours_had_none(self):
        """Ours beside their mean looks calm when their noises cancel; the gap between them shows it."""
        baseline, again = _rounds(10, 14, 10, 14), _rounds(14, 10, 14, 10)
        contrast = ratio_contrast(
            _rounds(17, 17, 17, 17), baseline, again, better="higher", margin=0.05, comparisons=20
        )
        assert contrast.verdict == "undecided"

    def test_zero_has_no_ratio(self):
        zero = _rounds(0, 0, 0)
        assert (
            ratio_contrast(zero, _rounds(1, 2, 3), _rounds(1, 2, 3), better="higher", margin=0.1, comparisons=1) is None
        )

    def test_differences_and_quantities_without_noise(self):
        divergence, floor = Estimate(0.5, 0.4, 0.6), Estimate(0.0, -0.001, 0.002)
        assert difference_contrast(divergence, divergence, floor, better="same", margin=0.01).verdict == "worse"
        assert difference_contrast(floor, floor, floor, better="same", margin=0.01).verdict == "same"
        assert exact_contrast(50.0, 100.0, 100.0, better="lower", margin=0.01).verdict == "better"
        assert exact_contrast(100.5, 100.0, 100.0, better="lower", margin=0.01).verdict == "same"

    def test_it_survives_json(self):
        contrast = _contrast(1.2, 1.4)
        plain = contrast.plain()
        assert plain["verdict"] == "better"
        assert Contrast.read(plain) == contrast


class TestSinceAnEarlierRun:
    def test_a_loss_of_what_was_gained_is_worse(self):
        assert _contrast(1.0, 1.02).since(_contrast(1.5, 1.52)).verdict == "worse"
        assert _contrast(1.5, 1.52).since(_contrast(1.0, 1.02)).verdict == "better"

    def test_luck_and_errors_of_both_runs_count(self):
        change = _contrast(1.4, 1.6, threshold=1.2).since(_contrast(1.4, 1.6, threshold=1.05))
        assert change.verdict == "same"
        assert 1.2 < change.threshold < 1.2 * 1.05
        assert change.certain.high > 1.6 / 1.5


class TestLuck:
    """Processes that differ by 2.5 % (standard deviation) for life, a machine that drifts, rounds with 2.5 % noise."""

    @pytest.mark.parametrize("starts", [1, 2])
    def test_equal_servers_are_neither_better_nor_worse(self, starts):
        runs = [simulated_verdicts(0.0, starts=starts, rounds=6, seed=seed, rows=4) for seed in range(60)]
        assert sum(bool(set(run) & {"better", "worse"}) for run in runs) <= 3

    def test_one_slow_process_is_averaged_out_by_the_next_start(self):
        """Ten percent between two processes of one kind have been seen."""
        runs = [simulated_verdicts(0.0, starts=2, rounds=6, seed=seed, rows=1, hit=-0.1) for seed in range(40)]
        assert sum(run[0] in ("same", "undecided") for run in runs) >= 38

    @pytest.mark.parametrize(
        ("effect", "starts", "rounds", "found"),
        [(0.3, 1, 6, 38), (0.3, 2, 6, 39), (-0.3, 1, 6, 38), (0.1, 2, 6, 20), (0.1, 3, 9, 32), (-0.1, 3, 9, 32)],
    )
    def test_a_planted_effect_is_found(self, effect, starts, rounds, found):
        runs = [simulated_verdicts(effect, starts=starts, rounds=rounds, seed=seed, rows=1) for seed in range(40)]
        assert sum(run == ["better" if effect > 0 else "worse"] for run in runs) >= found

    def test_equal_servers_are_found_to_be_the_same_with_enough_rounds(self):
        few, many = (
            [simulated_verdicts(0.0, starts=3, rounds=rounds, seed=seed)[0] for seed in range(40)] for rounds in (6, 24)
        )
        assert many.count("same") > few.count("same")
        assert many.count("same") >= 30

    def test_a_difference_beyond_the_margin_is_almost_never_the_same(self):
        """The margin of three starts is 5.8 %; a process's own luck has a standard deviation of 2.5 %."""
        runs = [
            simulated_verdicts(effect, starts=3, rounds=9, seed=seed)[0] for effect in (0.1, -0.1) for seed in range(60)
        ]
        assert runs.count("same") <= 0.025 * len(runs)

    def test_looking_several_times_causes_no_more_false_alarms(self):
        """Each run looks at its first 6, 12 and 24 rounds and stops at the first verdict."""
        alarms = 0
        for seed in range(60):
            looks = [simulated_verdicts(0.0, starts=2, rounds=rounds, seed=seed, looks=3)[0] for rounds in (6, 12, 24)]
            alarms += any(verdict in ("better", "worse") for verdict in looks)
        assert alarms <= 3


class TestRoundsToDecide:
    def test_a_decided_row_needs_none(self):
        assert _measured(0.3, 0.02).rounds_to_decide() is None
        assert _measured(0.0, 0.01).rounds_to_decide() is None

    def test_a_wide_interval_needs_four_times_the_rounds_to_become_half_as_wide(self):
        """The half width is twice the margin: 6 rounds become 24."""
        assert _measured(0.0, 2 * math.log(1.1)).rounds_to_decide() == 18

    def test_a_large_uncertain_effect_needs_rounds_until_the_certain_interval_excludes_zero(self):
        assert _measured(0.3, 0.2, certain=0.6).rounds_to_decide() == 18

    def test_rounds_cannot_decide_what_lies_on_the_margin_or_within_the_baselines_own_difference(self):
        assert _measured(math.log(1.1), 0.02).rounds_to_decide() is None
        assert _measured(0.2, 0.05, floor=0.25).rounds_to_decide() is None

    def test_what_was_not_measured_in_rounds_asks_for_none(self):
        interval = Estimate(0.02, -0.5, 0.54)
        assert difference_contrast(interval, interval, NOTHING, better="same", margin=0.01).rounds_to_decide() is None

    @pytest.mark.parametrize("effect", [0.0, 0.13])
    def test_about_that_many_rounds_decide(self, effect):
        """Over simulated runs: with the suggested number of rounds most undecided rows are decided."""
        decided = []
        for seed in range(40):
            first = simulated_contrasts(effect, starts=2, rounds=6, seed=seed)[0]
            needed = first.rounds_to_decide()
            if needed is not None and needed <= 60:
                rounds = 6 + needed + needed % 2
                decided.append(simulated_contrasts(effect, starts=2, rounds=rounds, seed=1000 + seed)[0].verdict)
        assert len(decided) >= 4
        assert sum(verdict != "undecided" for verdict in decided) >= len(decided) / 3


def _measured(effect, reach, certain=None, floor=0.0):
    """A contrast of six rounds, given by logarithms."""

    def interval(centre, half):
        return Estimate(math.exp(centre), math.exp(centre - half), math.exp(centre + half))

    threshold = max(0.1, math.exp(floor) - 1)
    return Contrast(
        "ratio",
        "higher",
        interval(effect, reach),
        interval(effect, certain or 2 * reach),
        interval(floor, 0.01),
        1 + threshold,
        1.1,
        rounds=6,
    )
