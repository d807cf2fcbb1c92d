"""The cost model alone: what it expects after the steps that it measured."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_instant.tools.measure.simulator import TWO_CORES, TWO_CORES_DRAFT_MODEL, roofline
from vllm_instant_plugins.goodput.costs import StepCosts


def _learn(costs, cost, steps=400, seed=0, noise=0.02, factor=1.0, max_requests=16):
    random = np.random.default_rng(seed)
    for _ in range(steps):
        requests = int(random.integers(1, max_requests + 1))
        length = int(random.integers(0, 9))
        drafts, draft_steps = requests * length, int(random.integers(0, 9))
        seconds = factor * cost.seconds(requests + drafts, 200 * requests, draft_steps, requests)
        x = costs.features(requests + drafts, 200 * requests, drafts, draft_steps, requests)
        costs.observe(x, seconds * (1 + noise * random.standard_normal()))


@pytest.mark.parametrize("cost", [TWO_CORES, TWO_CORES_DRAFT_MODEL, roofline(8e9)], ids=["cpu", "cpu+model", "gpu"])
def test_estimates_come_within_a_few_percent(cost):
    costs = StepCosts(16 * 9)
    _learn(costs, cost, steps=800)
    errors = []
    for requests in (1, 2, 4, 8, 16):
        for length in (0, 1, 3, 8):
            rows = requests * (1 + length)
            x = costs.features(rows, 200 * requests, requests * length, length, requests)
            truth = cost.seconds(rows, 200 * requests, length, requests)
            errors.append(abs(costs.estimate(x)[0] / truth - 1))
    assert np.median(errors) < 0.03
    assert max(errors) < 0.12


def test_a_curve_that_falls_is_learned_as_it_is():
    costs = StepCosts(64)
    _learn(costs, TWO_CORES, steps=800, max_requests=4)
    one, two, three = costs.target_seconds(np.array([1.0, 2.0, 3.0]), 200.0)
    assert two > 1.08 * one
    assert three < 0.92 * two


def test_parts_add_up_to_the_estimate():
    costs = StepCosts(144)
    _learn(costs, TWO_CORES_DRAFT_MODEL)
    whole, _ = costs.estimate(costs.features(20, 800, 16, 4, 4))
    parts = costs.target_seconds(np.array([20.0]), 800.0)[0] + costs.verify_seconds()
    parts += costs.draft_seconds(np.array([4.0]), np.array([20.0]), 4)[0]
    assert parts == pytest.approx(whole, rel=0.02)


def test_a_hiccup_moves_little_and_a_lasting_change_is_followed():
    costs = StepCosts(144)
    _learn(costs, TWO_CORES, noise=0.01)
    x, drafting = costs.features(4, 800, 0, 0, 4), costs.features(12, 800, 8, 2, 4)
    before = costs.estimate(x)[0]
    ratio = costs.estimate(drafting)[0] / before
    costs.observe(x, 50 * before)
    assert costs.estimate(x)[0] < 1.2 * before
    assert costs.estimate(drafting)[0] / costs.estimate(x)[0] == pytest.approx(ratio, rel=0.2)
    for _ in range(5):
        costs.observe(x, before)
    assert costs.estimate(x)[0] == pytest.approx(before, rel=0.02)
    _learn(costs, TWO_CORES, steps=250, factor=1.5, noise=0.01)
    assert costs.estimate(x)[0] == pytest.approx(1.5 * before, rel=0.08)


def test_what_all_steps_are_off_by_is_not_taken_for_noise():
    """A machine that was shaken while it started is calibrated_survival to be fast soon after it is."""
    costs, random = StepCosts(144), np.random.default_rng(0)
    x = costs.features(9, 300, 8, 8, 1)
    for factor in (*random.uniform(1.0, 3.0, 60), *(1 + 0.02 * random.standard_normal(100))):
        costs.observe(x, 0.03 * factor)
    assert costs.estimate(x)[0] == pytest.approx(0.03, rel=0.05)


def test_neither_verifying_nor_drafting_takes_less_than_nothing():
    """Whatever the first times were: a step without drafts is not thought to take longer for having none."""
    for shaken in (1.0, 2.2, 4.0):
        costs = StepCosts(144)
        for number in range(90):
            costs.observe(costs.features(9, 300, 8, 8, 1), 0.030 * (shaken if number < 3 else 1.0))
        assert costs.verify_seconds() >= 0
        assert (costs.draft_weights() > -1e-8).all()
        assert costs.estimate(costs.features(1, 300, 0, 0, 1))[0] < 0.033


def test_a_slower_machine_is_noticed_for_sizes_that_do_not_run_now():
    costs = StepCosts(144)
    _learn(costs, TWO_CORES, noise=0.01)
    other = costs.features(64, 800, 60, 0, 4)
    before = costs.estimate(other)[0]
    for _ in range(300):
        costs.observe(costs.features(4, 800, 0, 0, 4), 2 * TWO_CORES.seconds(4, 800, 0, 4))
    assert costs.estimate(other)[0] > 1.15 * before


def test_before_other_sizes_were_measured_drafts_look_cheap_and_uncertain():
    costs = StepCosts(144)
    costs.observe(costs.features(4, 400, 0, 0, 4), 0.020)
    near, far = costs.features(5, 400, 1, 1, 4), costs.features(100, 400, 96, 8, 4)
    assert costs.estimate(near)[0] < 0.024
    assert costs.estimate(far)[0] < 4 * 0.020
    assert costs.estimate(far)[1] > costs.estimate(near)[1] > 0


@given(st.lists(st.tuples(st.integers(1, 144), st.floats(1e-5, 30.0)), min_size=1, max_size=80))
@settings(max_examples=50, deadline=None)
def test_no_measurement_breaks_it(measured):
    costs = StepCosts(144)
    for rows, seconds in measured:
        costs.observe(costs.features(rows, 10.0 * rows, rows // 2, rows % 9, 1 + rows // 9), seconds)
    every = np.arange(1.0, 145.0)
    assert np.isfinite(costs.target_seconds(every, 100.0)).all()
    assert (costs.target_seconds(every, 100.0) > 0).all()
    assert (costs.draft_seconds(np.arange(9.0), np.full(9, 20.0), 8) >= 0).all()


def test_state_survives_json():
    costs, copy = StepCosts(144), StepCosts(144)
    _learn(costs, TWO_CORES)
    assert copy.restore(json.loads(json.dumps(costs.state())))
    x = costs.features(20, 800, 16, 4, 4)
    assert copy.estimate(x)[0] == pytest.approx(costs.estimate(x)[0])
    assert copy.estimate(x)[1] > 5 * costs.estimate(x)[1], "stored costs are doubted"
    assert copy.max_measured_rows == costs.max_measured_rows


@pytest.mark.parametrize(
    "damage",
    [
        {"weights": [1.0]},
        {"noise": 0},
        {"covariance": [[1.0]]},
        {"knots": "x"},
        {"weights": None},
        {"observations": None},
        {"max_measured_rows": "many"},
    ],
)
def test_a_damaged_state_changes_nothing(damage):
    costs, other = StepCosts(144), StepCosts(144)
    _learn(costs, TWO_CORES)
    assert not other.restore(costs.state() | damage)
    assert not other.ready


@pytest.mark.parametrize("rows", [1, 2, 7, 300, 9216])
def test_any_number_of_rows(rows):
    costs = StepCosts(rows)
    assert costs.max_rows >= rows
    assert (np.diff(costs.knots) > 0).all()
    costs.observe(costs.features(rows, 0, 0, 0, 1), 0.01)
    assert costs.target_seconds(np.array([float(rows)]), 0.0)[0] == pytest.approx(0.01, rel=0.05)


def test_what_a_resuming_drafter_reads_is_learned_apart_from_what_drafting_costs():
    costs, random = StepCosts(64), np.random.default_rng(0)
    for _ in range(400):
        draft_steps, uncached_tokens = (
            (1, int(random.integers(1, 4)) * 100) if random.random() < 0.5 else (int(random.random() < 0.5), 0)
        )
        seconds = 0.02 + 0.002 * draft_steps + (0.001 + uncached_tokens * 2e-5 if uncached_tokens else 0.0)
        costs.observe(
            costs.features(4, 400, 0, draft_steps, 4, uncached_tokens), seconds * (1 + 0.01 * random.standard_normal())
        )
    assert costs.catch_up_seconds(300) == pytest.approx(0.007, rel=0.15)
    assert costs.catch_up_seconds(0) == 0
    assert float(costs.draft_seconds(np.array(1.0), np.array(4.0), 4)) == pytest.approx(0.002, rel=0.3)


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(1e-3, 1.0)), min_size=1, max_size=60), st.integers(1, 40))
@example([(16, 0.5), (1, 1.0)], 39)
@settings(max_examples=60, deadline=None)
def test_more_rows_take_no_less_time_unless_both_were_measured_recently(measured, rows):
    costs = StepCosts(64)
    for size, seconds in measured:
        costs.observe(costs.features(size, 0.0, 0, 0, size), seconds)
    # Nothing but steps with ``rows`` rows for a long time: about others nothing recent is known.
    for _ in range(150):
        costs.observe(costs.features(rows, 0.0, 0, 0, rows), 0.05)
    every = costs.target_seconds(np.arange(1.0, 64.0), 0.0)
    # Between two sizes at which the curve is bent, both are measured.
    below, above = costs.knots[costs.knots <= rows].max(), costs.knots[costs.knots >= rows].min()
    elsewhere = (np.arange(1.0, 63.0) < below) | (np.arange(1.0, 63.0) >= above)
    assert (np.diff(every)[elsewhere] >= -1e-9).all()


def test_what_was_measured_once_does_not_outlast_what_is_measured_now():
    """A server whose first step was slow, and which has drafted ever since."""
    costs = StepCosts(64)
    costs.observe(costs.features(1, 100, 0, 0, 1), 0.0412)
    for _ in range(150):
        costs.observe(costs.features(5, 100, 4, 4, 1), 0.0349)
    assert costs.target_seconds(np.array([1.0]), 100)[0] <= 1.001 * costs.target_seconds(np.array([5.0]), 100)[0]
    assert costs.reference_deviation(1, 100, 4, 4, 1) > 0.03


def test_the_kept_curve_follows_every_measurement():
    costs = StepCosts(64)
    for seconds in (0.02, 0.02, 0.03, 0.03):
        costs.observe(costs.features(1, 0, 0, 0, 1), seconds)
        before = costs.at_knots()
        assert costs.at_knots() is before
    costs.observe(costs.features(1, 0, 0, 0, 1), 0.06)
    assert costs.at_knots()[0] > 1.05 * before[0]
    other = StepCosts(64)
    other.observe(other.features(1, 0, 0, 0, 1), 0.5)
    other.at_knots()
    assert other.restore(costs.state())
    assert other.at_knots()[0] == costs.at_knots()[0]


def test_a_first_step_that_was_slow_is_corrected_at_once():
    costs = StepCosts(64)
    for seconds in (0.1, 0.05, 0.04, 0.04):
        costs.observe(costs.features(1, 100, 0, 0, 1), seconds)
    assert costs.estimate(costs.features(1, 100, 0, 0, 1))[0] == pytest.approx(0.04, rel=0.1)
    assert costs.estimate(costs.features(8, 100, 7, 4, 1))[0] < 0.08
