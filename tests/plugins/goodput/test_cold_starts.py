"""Fresh servers: from the first token on, drafting costs next to nothing where nothing is accepted."""

import copy

import numpy as np
import pytest
from cold_starts import CURVES, DRAFTS, MAX_DRAFT_TOKENS, fixed_speed, relative_speeds, start

from vllm_instant.tools.measure.simulator import RequestClass, simulate
from vllm_instant_plugins.goodput.policy import GoodputPolicy

STARTS = {1: 40, 4: 12, 16: 5}
LOOKUPS = [curve for curve in CURVES if curve.endswith("lookup")]


def _policy(clock, **options):
    return GoodputPolicy(MAX_DRAFT_TOKENS, 16, clock=clock, **options)


def _confident(clock):
    return _policy(clock, confident_drafts=True)


def _is_as_fast_as_without_drafts(speeds):
    return np.median(speeds) >= 0.97 and speeds.min() >= 0.93


@pytest.mark.parametrize("users", STARTS)
@pytest.mark.parametrize("curve", ["amx", "avx", "gpu"])
def test_a_fresh_server_with_hopeless_drafts_is_as_fast_as_without_drafts(curve, users):
    speeds, _ = relative_speeds(_policy, curve, "hopeless", users, range(STARTS[users]))
    assert _is_as_fast_as_without_drafts(speeds), (np.median(speeds), speeds.min())


@pytest.mark.parametrize("users", STARTS)
@pytest.mark.parametrize("curve", LOOKUPS)
def test_a_fresh_server_with_overconfident_lookups_is_as_fast_as_without_drafts(curve, users):
    speeds, _ = relative_speeds(_confident, curve, "hopeless", users, range(STARTS[users]), stated=0.5)
    assert np.median(speeds) >= 0.97, np.median(speeds)
    assert speeds.min() >= 0.92, speeds.min()


@pytest.mark.parametrize("users", STARTS)
@pytest.mark.parametrize("curve", ["amx", "avx", "gpu"])
def test_a_fresh_server_with_perfect_drafts_is_nearly_as_fast_as_the_best_fixed_length(curve, users):
    speeds, _ = relative_speeds(_policy, curve, "oracle", users, range(STARTS[users] // 2))
    assert speeds.min() >= 0.9, speeds.min()


@pytest.mark.parametrize("curve", ["amx", "avx", "gpu"])
def test_few_drafts_show_a_fresh_server_that_nothing_is_accepted(curve):
    starts = [start(_policy, curve, "hopeless", seed=seed) for seed in range(40)]
    rejected = [found.drafted for found in starts if found.accepted == 0]
    assert len(rejected) >= 5
    assert max(rejected) <= 40
    # A lucky token is a reason to try more.
    few_accepted = [found.drafted for found in starts if found.accepted <= 0.05 * found.drafted]
    assert np.quantile(few_accepted, 0.9) <= 40
    assert max(few_accepted) <= 60


@pytest.mark.perf
@pytest.mark.parametrize("curve", ["amx", "avx", "gpu"])
def test_a_thousand_fresh_servers_with_hopeless_drafts(curve):
    speeds, _ = relative_speeds(_policy, curve, "hopeless", 1, range(1000))
    assert _is_as_fast_as_without_drafts(speeds), (np.median(speeds), speeds.min())


# ----------------------------------------------------------------------------------------------------- stored costs


class Store:
    """Stored costs in memory."""

    def __init__(self, state=None):
        self.state = state

    def load(self):
        return copy.deepcopy(self.state)

    def save(self, state):
        self.state = state

    save_in_background = save


def _scaled(factor):
    def change(state):
        state["weights"] = [factor * weight for weight in state["weights"]]
        state["covariance"] = [[factor**2 * entry for entry in row] for row in state["covariance"]]

    return change


def _right(state):
    """As they were measured."""


def _sawtooth(state):
    """Each second number of rows is far cheaper than its neighbours."""
    for index in range(len(state["knots"])):
        state["weights"][index] *= 1.3 if index % 2 == 0 else 0.8


def _falling(state):
    """The more rows, the less time."""
    count = len(state["knots"])
    state["weights"][:count] = state["weights"][:count][::-1]


def _free_drafts(state):
    """Drafts cost nothing, and a step without them is too long by two fifths."""
    count = len(state["knots"])
    state["weights"][count + 1 :] = [0.0] * len(state["weights"][count + 1 :])
    state["weights"][0] *= 1.4


def _other_length(state):
    """From a server with another limit of draft tokens."""
    state["knots"], state["weights"] = state["knots"][:-2], state["weights"][:-2]


PLANTED = {
    "right": _right,
    "too short": _scaled(0.3),
    "too long": _scaled(3.0),
    "sawtooth": _sawtooth,
    "falling": _falling,
    "free drafts": _free_drafts,
    "another length": _other_length,
}


@pytest.fixture(scope="module")
def stored():
    """Costs that a calibrated server stored, by curve."""

    def costs(curve):
        store = Store()
        simulate(
            lambda clock: _policy(clock, calibrating=True, store=store),
            [RequestClass(DRAFTS["mediocre"])],
            CURVES[curve],
            concurrency=4,
            requests=12,
            max_draft_tokens=MAX_DRAFT_TOKENS,
        )
        return store.state

    return {curve: costs(curve) for curve in ("amx", "avx")}


@pytest.mark.parametrize("users", [1, 8])
@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("curve", ["amx", "avx"])
def test_wrong_stored_costs_do_not_hurt(stored, curve, planted, users):
    state = copy.deepcopy(stored[curve])
    PLANTED[planted](state)

    def policy(clock):
        return _policy(clock, store=Store(state))

    speeds, _ = relative_speeds(policy, curve, "hopeless", users, range(20 if users == 1 else 5))
    assert np.median(speeds) >= 0.96, np.median(speeds)
    assert speeds.min() >= 0.92, speeds.min()
    speeds, _ = relative_speeds(policy, curve, "oracle", users, range(4))
    assert speeds.min() >= 0.9, speeds.min()


# ----------------------------------------------------------------------------------------------------- the measure


def test_the_measure_sees_a_policy_that_always_drafts():
    """Planted: what the tests above would find."""
    without, always = fixed_speed("amx", "hopeless", 1, 0, 0), fixed_speed("amx", "hopeless", 1, 8, 0)
    assert always < 0.8 * without
