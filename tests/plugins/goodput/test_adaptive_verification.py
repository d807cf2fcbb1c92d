"""vLLM's adaptive verification trims where that brings more than this policy's own plans, and nowhere else."""

from dataclasses import dataclass

import numpy as np
import pytest

from vllm_instant import RequestState, StepOutcome, UpcomingStep
from vllm_instant_plugins.goodput.adaptive_verification import MIN_REQUESTS
from vllm_instant_plugins.goodput.latency_slo import LatencySlo
from vllm_instant_plugins.goodput.policy import GoodputPolicy

MAXIMUM = 4
STEP = 0.05


@dataclass
class World:
    """Drafts are never accepted where this policy plans them; where vLLM trims, steps are as given here."""

    accepted: float
    """Of each request per trimmed step, on average."""
    times: float
    """Length of a trimmed step relative to one without drafts."""

    @property
    def speed(self):
        return (1 + self.accepted) / self.times


def _states(users):
    return [RequestState(f"r{number}", 100, 100, 0.0, index=number) for number in range(users)]


def _serve(policy, states, world, steps, number=1, seed=0, refused=()):
    """Whether each step was trimmed; requests in ``refused`` never have drafts accepted."""
    random = np.random.default_rng(seed)
    trimmed = []
    drafted, may_trim = [0] * len(states), False
    for step in range(number, number + steps):
        noise = 1 + 0.05 * random.standard_normal()
        trims = may_trim and sum(drafted) > 0
        accepted = np.zeros(len(states), int)
        seconds = STEP * (1 + 0.05 * sum(drafted) / len(states))
        if trims:
            accepted = np.minimum(random.poisson(world.accepted, len(states)), MAXIMUM)
            accepted[[index for index, state in enumerate(states) if state in refused]] = 0
            seconds = STEP * world.times
        outcome = StepOutcome(
            states, drafted, accepted.tolist(), len(states) + sum(drafted), seconds * noise, len(states), step,
            max(drafted), trimmed=trims,
        )  # fmt: skip
        policy.observe(outcome)
        drafted = list(policy.get_num_draft_tokens(UpcomingStep(states, MAXIMUM, number=step)))
        may_trim = policy.trims_verification()
        trimmed.append(may_trim)
    return trimmed


def _policy(states, **options):
    policy = GoodputPolicy(MAXIMUM, 256, **{"adaptive_verification": True, "slowest_request": 0.0, **options})
    for state in states:
        policy.enter(state)
    return policy


BETTER, WORSE = World(1.2, 1.5), World(0.5, 1.9)


def test_the_better_of_both_is_taken():
    states = _states(64)
    trimmed = _serve(_policy(states), states, BETTER, 600)
    assert np.mean(trimmed[300:]) > 0.9


def test_trying_a_worse_way_costs_less_than_the_budget_of_explorations():
    states = _states(64)
    trimmed = _serve(_policy(states), states, WORSE, 2000)
    assert 0 < np.mean(trimmed) * (1 - WORSE.speed) < 0.007


def test_below_the_load_where_it_is_known_to_lose_nothing_is_trimmed():
    states = _states(MIN_REQUESTS - 1)
    assert not any(_serve(_policy(states), states, BETTER, 600))


def test_each_load_has_a_choice_of_its_own():
    many, few = _states(128), _states(40)
    policy = _policy(many)
    assert np.mean(_serve(policy, many, BETTER, 600)[300:]) > 0.9
    assert np.mean(_serve(policy, few, WORSE, 600, number=601)) < 0.1


def test_what_becomes_worse_is_left_again():
    states = _states(64)
    policy = _policy(states)
    _serve(policy, states, BETTER, 600)
    assert np.mean(_serve(policy, states, WORSE, 600, number=601)[300:]) < 0.1


def test_what_becomes_better_is_found():
    states = _states(64)
    policy = _policy(states)
    _serve(policy, states, World(0.4, 1.42), 600)
    assert np.mean(_serve(policy, states, World(3.0, 1.5), 3000, number=601)[2500:]) > 0.9


@pytest.mark.parametrize("floor", [0.95, 0.0])
def test_no_request_is_slowed_down_for_others(floor):
    """One request has nothing accepted in steps that take 1.5 times as long; once it has ended, vLLM may trim."""
    states = _states(64)
    policy = _policy(states, slowest_request=floor)
    with_it = _serve(policy, states, BETTER, 600, refused=states[:1])
    assert (np.mean(with_it[300:]) > 0.9) == (not floor)
    policy.forget(states[0].request_id)
    # Another request may have the same id.
    assert np.mean(_serve(policy, states, BETTER, 600, number=601)[300:]) > 0.9


def test_drafts_that_may_not_have_been_verified_teach_nothing_about_acceptance_and_costs():
    states = _states(64)
    policy, other = _policy(states), _policy(states)
    for one, outcomes in ((policy, 20), (other, 0)):
        _serve(one, states, WORSE, 12)
        for number in range(outcomes):
            drafted = [MAXIMUM] * len(states)
            total = len(states) * (MAXIMUM + 1)
            one.observe(StepOutcome(states, drafted, drafted, total, 9.0, len(states), 20 + number, trimmed=True))
    indices = np.arange(len(states))
    assert np.array_equal(policy.acceptance.survival(indices), other.acceptance.survival(indices))
    assert policy.costs.observations == other.costs.observations


@pytest.mark.parametrize(
    "options", [{"adaptive_verification": False}, {"calibrating": True}, {"slo": LatencySlo(1.0, None)}]
)
def test_nothing_is_trimmed_without_the_option_of_vllm_while_calibrating_and_with_latency_goals(options):
    states = _states(64)
    assert not any(_serve(_policy(states, **options), states, BETTER, 400))


def test_its_reasons_are_explained():
    states = _states(64)
    policy = _policy(states)
    _serve(policy, states, BETTER, 400)
    reasons = {decision["reason"]: decision["explanation"] for decision in policy.decisions(400)}
    assert {"trimmed", "trim trial"} <= set(reasons)
    assert not any("no further explanation" in text for text in reasons.values())
