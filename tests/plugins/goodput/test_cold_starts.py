"""Fresh servers: from the first token on, drafting costs next to nothing where nothing is accepted."""

import copy

import numpy as np
import pytest
from cold_starts import CURVES, DRAFTS, MAX_DRAFT_TOKENS, PLANTED, Store, fixed_speed, relative_speeds, start

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
    assert _is_as_fast_as_without_drafts(speeds), (np.median(speeds), speeds.min())


@pytest.mark.parametrize("users", STARTS)
@pytest.mark.parametrize("curve", ["amx", "avx", "gpu"])
def test_a_fresh_server_with_perfect_drafts_is_nearly_as_fast_as_the_best_fixed_length(curve, users):
    speeds, _ = relative_speeds(_policy, curve, "oracle", users, range(STARTS[users] // 2))
    assert speeds.min() >= 0.9, speeds.min()


@pytest.mark.parametrize("curve", ["amx", "avx", "gpu"])
def test_few_drafts_show_a_fresh_server_that_nothing_is_accepted(curve):
    starts = [start(_policy, curve, "hopeless", seed=seed) for seed in range(40)]
    few_accepted = [found.drafted for found in starts if found.accepted <= 0.05 * found.drafted]
    assert len(few_accepted) >= 20
    # The others had their few accepted drafts at the very start.
    assert np.quantile(few_accepted, 0.95) <= 40
    assert max(few_accepted) <= 60


@pytest.mark.perf
@pytest.mark.parametrize("curve", ["amx", "avx", "gpu"])
def test_a_thousand_fresh_servers_with_hopeless_drafts(curve):
    speeds, _ = relative_speeds(_policy, curve, "hopeless", 1, range(1000))
    assert _is_as_fast_as_without_drafts(speeds), (np.median(speeds), speeds.min())


# ----------------------------------------------------------------------------------------------------- stored costs


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
    assert _is_as_fast_as_without_drafts(speeds), (np.median(speeds), speeds.min())
    speeds, _ = relative_speeds(policy, curve, "oracle", users, range(4))
    assert speeds.min() >= 0.9, speeds.min()


# ----------------------------------------------------------------------------------------------------- the measure


def test_the_measure_sees_a_policy_that_always_drafts():
    """Planted: what the tests above would find."""
    without, always = fixed_speed("amx", "hopeless", 1, 0, 0), fixed_speed("amx", "hopeless", 1, 8, 0)
    assert always < 0.8 * without
