"""The quality gate in simulations: far beyond the limit, well within it, near it, and recovery."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant.interfaces.experts import Measurement, RoutingMeasures
from vllm_instant_plugins.super_expert.quality_gate import MIN_PATIENCE, GateDecision, QualityGate
from vllm_instant_plugins.super_expert.router import SuperExpertRouter

LIMIT = 0.02


class Serving:
    """A router with a known mean divergence per level; tokens scatter as widely as measured ones."""

    def __init__(self, means, batch=8, seed=0, min_kept=0.0, kept=None, max_kl=LIMIT):
        self.gate = QualityGate(0.3, max_kl, min_kept)
        self.router = SuperExpertRouter(0.3, 1, self.gate)
        self.means, self.batch, self.kept = means, batch, kept or [1.0] * len(means)
        self.random = np.random.default_rng(seed)
        self.levels, self.references, self.number = [], 0, 0

    def run(self, steps):
        for _ in range(steps):
            self.number += 1
            look = self.router.measurement(self.number)
            if look is not Measurement.OFF:
                self.router.observe(self._measures(look))
            self.references += look is Measurement.REFERENCE
            self.levels.append(self.gate.level)
        return self

    def _measures(self, look):
        level = self.gate.level
        if look is Measurement.COUNTS:
            return RoutingMeasures(1.0, 40.0, 20.0, 1.0, self.kept[level], 0.0, 0.0, 0.0)
        compared = level if self.gate.compared_level is None else self.gate.compared_level
        # Most tokens hardly differ, a few differ much: the standard deviation is about three times the mean.
        tokens = self.means[compared] * self.random.lognormal(-1.1, 1.5, min(8, self.batch))
        tokens = [float(t) for t in tokens]
        return RoutingMeasures(
            1.0, 40.0, 20.0, 1.0, self.kept[level], len(tokens), sum(tokens), sum(t * t for t in tokens)
        )


@pytest.mark.parametrize("batch", [1, 2, 8, 32])
@pytest.mark.parametrize("seed", range(5))
def test_levels_far_beyond_the_limit_are_left_within_200_steps(batch, seed):
    """All levels but the model's own routing are far beyond the budget."""
    serving = Serving([1.5, 1.2, 0.9, 0.6, 0.0], batch, seed).run(200)
    assert serving.gate.level == serving.gate.last
    assert serving.router.fraction == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_loosening_stops_at_the_first_level_within_the_limit(seed):
    serving = Serving([0.5, 0.2, 0.005, 0.002, 0.0], 8, seed).run(1500)
    assert serving.gate.level == 2


def test_false_alarms_are_rare():
    """Half of the budget is used, for 100 000 steps in all."""
    alarms = sum(Serving([0.01, 0.005, 0.002, 0.001, 0.0], 8, seed).run(5000).gate.loosened for seed in range(20))
    assert alarms <= 2


def test_a_small_excess_is_detected_in_the_long_run():
    found = [Serving([1.5 * LIMIT, 0.004, 0.002, 0.001, 0.0], 8, seed).run(20_000).gate.loosened for seed in range(5)]
    assert min(found) >= 1


def test_the_level_does_not_oscillate():
    """Level 1 is within the limit, level 0 never is: attempts to tighten become rare."""
    serving = Serving([0.1, 0.002, 0.001, 0.001, 0.0], 8).run(60_000)
    changes = int(np.count_nonzero(np.diff(serving.levels)))
    assert changes <= 12
    assert np.mean(np.array(serving.levels) == 0) < 0.02


def test_the_level_recovers_when_the_cause_is_gone():
    serving = Serving([1.0, 1.0, 1.0, 1.0, 0.0], 8).run(300)
    assert serving.gate.level == serving.gate.last
    serving.means = [0.002, 0.001, 0.001, 0.001, 0.0]
    serving.run(20 * MIN_PATIENCE)
    assert serving.gate.level == 0


def test_reference_passes_run_in_less_than_two_percent_of_steps():
    assert Serving([0.002, 0.001, 0.001, 0.001, 0.0]).run(10_000).references < 200


def test_the_kept_mass_alone_can_loosen_the_level():
    serving = Serving([0.001] * 5, min_kept=0.8, kept=[0.4, 0.6, 0.7, 0.9, 1.0]).run(400)
    assert serving.gate.level == 3


def test_another_budget_restarts_the_gate():
    gate = QualityGate(0.3, LIMIT)
    assert gate.observe(4, 10.0) is GateDecision.UNCHANGED
    assert gate.observe(8, 10.0) is GateDecision.LOOSENED
    assert gate.share() == pytest.approx(0.3 + 0.7 / 4)
    gate.start(0.6, 11)
    assert (gate.level, gate.share()) == (0, 0.6)
    assert gate.evidence.mean_kl is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["lognormal", "rare", "steady"]))
def test_alarms_are_rare_at_the_limit_whatever_the_tail(seed, kind):
    """With the mean at the limit, the probability of an alarm within 100 measurements is at most 0.1."""
    random = np.random.default_rng(seed)
    alarms = 0
    for _ in range(40):
        gate = QualityGate(0.3, LIMIT)
        for step in range(25):
            value = {
                "lognormal": LIMIT * random.lognormal(-1.125, 1.5),
                "rare": 20 * LIMIT * float(random.random() < 0.05),
                "steady": LIMIT * random.normal(1, 0.1),
            }[kind]
            gate.observe(step, max(0.0, value))
        alarms += gate.loosened > 0
    assert alarms <= 5
