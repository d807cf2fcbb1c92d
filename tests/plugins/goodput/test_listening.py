"""Lookups that calibrate themselves are asked in every step, and no draft is verified for the sake of learning."""

from types import SimpleNamespace

import numpy as np
import pytest
from cold_starts import Store, relative_speeds

from vllm_instant.tools.measure.simulator import HostNoise, RequestClass, StepCost, roofline, simulate, steady
from vllm_instant_plugins.goodput.latency_slo import LatencySlo
from vllm_instant_plugins.goodput.listening import MAX_DRAFTED_STEPS, MAX_LISTENED, Listener
from vllm_instant_plugins.goodput.policy import GoodputPolicy
from vllm_instant_plugins.speculation import Fixed

SLOW = StepCost([(1, 0.05), (200, 0.85)], context_second=2e6)
"""Each row takes 8 % of a step for one request: as a small model on two cores."""
EXPLORATIONS = {"probe", "follow-up", "trial", "draft+probe"}


class Watched(GoodputPolicy):
    """Keeps what the log forgets: the reason of each step, and the draft tokens that it verified."""

    def __init__(self, clock, slo=None, **options):
        super().__init__(8, 16, slo, clock=clock, confident_drafts=True, **{"self_calibrating": True, **options})
        self.reasons, self.verified, self.balances = [], [], []

    def get_num_draft_tokens(self, step):
        granted = super().get_num_draft_tokens(step)
        self.reasons.append(self.log.newest_decision.reason)
        self.balances.append(self.explorer.budget.balance)
        return granted

    def observe(self, outcome):
        super().observe(outcome)
        decision = self.log.of_step(outcome.number - 1)
        self.verified.append((decision.reason if decision else "", sum(outcome.drafted)))


def _watch(classes, users, cost=SLOW, requests=20, seed=1, **options):
    policies = []

    def make(clock):
        policies.append(Watched(clock, **options))
        return policies[0]

    report = simulate(make, classes, cost, concurrency=users, requests=requests, noise=HostNoise(), seed=seed)
    return policies[0], report


def _speed_without(classes, users, requests=20, seed=1):
    return simulate(
        lambda clock: Fixed(0, None),
        classes,
        SLOW,
        concurrency=users,
        requests=requests,
        noise=HostNoise(),
        seed=seed,
    ).tokens_per_second


RARE = [RequestClass(steady(0.95), finds=0.02, stated=0.95)]
HONEST = [RequestClass(steady(0.03), stated=0.03)]


@pytest.mark.parametrize("users", [1, 4])
def test_what_is_rarely_found_is_verified_whenever_it_is_found(users):
    policy, report = _watch(RARE, users)
    assert not EXPLORATIONS & set(policy.reasons)
    found = 8 * 0.02 * report.steps * users
    assert report.drafted > 0.5 * found
    assert report.tokens_per_second > 1.01 * _speed_without(RARE, users)


@pytest.mark.parametrize("users", [1, 4, 16])
def test_hopeless_drafts_are_not_verified(users):
    policy, report = _watch(HONEST, users)
    assert {"listen", "draft"} & set(policy.reasons)
    assert report.drafted <= 0.05 * report.steps
    assert report.tokens_per_second > 0.995 * _speed_without(HONEST, users)


def test_probes_remain_where_asking_would_take_time_or_with_latency_goals():
    fast = roofline(1e9, overhead=0.0)
    for cost, slo in ((fast, None), (SLOW, LatencySlo(1.0, 1.0))):
        policy, _ = _watch(HONEST, 4, cost, slo=slo)
        assert "listen" not in policy.reasons
        assert EXPLORATIONS & set(policy.reasons)


def test_probes_remain_for_drafters_that_learn_from_verified_drafts_alone():
    policy, _ = _watch(HONEST, 4, self_calibrating=False)
    assert "listen" not in policy.reasons
    assert EXPLORATIONS & set(policy.reasons)


@pytest.mark.parametrize("users", [1, 4, 16])
@pytest.mark.parametrize("curve", ["amx lookup", "avx lookup"])
def test_a_lookup_that_is_sure_and_always_wrong_has_a_budget(curve, users):
    def policy(clock):
        return GoodputPolicy(8, 16, clock=clock, confident_drafts=True, self_calibrating=True, slowest_request=0.95)

    speeds, _ = relative_speeds(policy, curve, "hopeless", users, range({1: 24, 4: 8, 16: 4}[users]), stated=0.5)
    assert np.median(speeds) >= 0.95
    assert speeds.min() >= 0.93


def test_losses_are_taken_from_the_budget_and_gains_are_credited():
    wrong, _ = _watch([RequestClass(steady(0.0), stated=0.6)], 4)
    assert min(wrong.balances) < 0.0
    assert "off" in wrong.reasons
    right, _ = _watch([RequestClass(steady(0.6), finds=0.3, stated=0.6)], 4)
    assert right.reasons.count("off") < 0.02 * len(right.reasons)


def test_drafts_that_do_not_pay_on_average_are_few_and_leave_steps_to_compare_with():
    policy, _ = _watch([RequestClass(steady(0.25), finds=0.5, stated=0.3)], 4, requests=40, slowest_request=0.95)
    listened = [drafts for reason, drafts in policy.verified if reason == "listen"]
    assert any(listened)
    assert max(listened) <= MAX_LISTENED
    streak = longest = 0
    for reason, drafts in policy.verified:
        streak = streak + 1 if drafts and reason == "listen" else 0
        longest = max(longest, streak)
    # A decision may be repeated, and the next one is made before the outcome of the last one is known.
    assert longest <= MAX_DRAFTED_STEPS + 5


@pytest.mark.parametrize(("pays", "reason", "max_rows"), [(False, "listen", 20 + MAX_LISTENED), (True, "draft", 500)])
def test_the_limit_holds_while_drafts_do_not_pay(pays, reason, max_rows):
    budget = SimpleNamespace(balance=0.0)
    explorer = SimpleNamespace(budget=budget, is_reference_due=lambda now: False)
    now = SimpleNamespace(plan=SimpleNamespace(num_requests=16), more_rows=4.0, max_rows=500)
    assert Listener(None, explorer).reason(now, pays) == reason
    assert now.max_rows == max_rows


def test_a_new_server_does_not_assume_that_drafts_are_accepted():
    policy, _ = _watch([RequestClass(steady(0.0), stated=0.6)], 16, requests=16)
    assert "draft" not in policy.reasons
    assert max(drafts for _, drafts in policy.verified) <= max(MAX_LISTENED, 8)


def test_a_wrong_cost_of_verification_is_corrected_once_drafts_are_promising():
    """The stored costs say that the verification of any draft takes two steps."""
    state = _calibrated()
    state["weights"][len(state["knots"]) + 1] += 0.12
    lookup = [RequestClass(steady(0.9), stated=0.6)]
    _, report = _watch(lookup, 1, store=Store(state), requests=10)
    assert report.tokens_per_second > 1.5 * _speed_without(lookup, 1, requests=10)


def _calibrated():
    store = Store()
    simulate(
        lambda clock: GoodputPolicy(8, 16, clock=clock, calibrating=True, store=store),
        [RequestClass(steady(0.5))],
        SLOW,
        concurrency=2,
        requests=12,
    )
    return store.state
