"""Several requests are delayed by drafts, and by explorations, only where that is worth the delay."""

import numpy as np
import pytest

from vllm_instant import RequestState, StepOutcome, UpcomingStep
from vllm_instant.tools.measure.simulator import HostNoise, RequestClass, StepCost, simulate, steady
from vllm_instant_plugins.goodput.policy import GoodputPolicy

USERS = 8
STEEP = StepCost([(1, 0.05), (8, 0.08), (9, 0.092), (16, 0.11), (200, 0.6)], context_second=1e9)
"""The verification of any draft beside eight requests takes 15 % longer."""
SMALL_GAIN = [RequestClass(steady(0.49, 0.2), output_tokens=(150, 150))]
"""One draft token for each request brings 49 % more tokens in steps that take 38 % longer."""
HOPELESS = [RequestClass(steady(0.0), output_tokens=(150, 150))]


def _serve(classes, users=USERS, **options):
    return simulate(
        lambda clock: GoodputPolicy(4, 16, clock=clock, **options),
        classes,
        STEEP,
        concurrency=users,
        requests=6 * users,
        warm_up_requests=users,
        max_draft_tokens=4,
        noise=HostNoise(jitter=0.01),
        seed=1,
    )


def _share_of_long_steps(report):
    seconds = np.array(report.step_seconds)
    return float((seconds > 1.05 * np.median(seconds)).mean())


def test_explorations_that_delay_several_requests_leave_the_99th_percentile_alone():
    assert _share_of_long_steps(_serve(HOPELESS, slowest_request=0.95)) < 0.01
    assert _share_of_long_steps(_serve(HOPELESS, slowest_request=0.0)) > 0.015


def test_a_request_alone_is_explored_as_often_as_ever():
    bounded, unbounded = (_serve(HOPELESS, users=1, slowest_request=floor) for floor in (0.95, 0.0))
    assert bounded.step_drafted == unbounded.step_drafted


@pytest.mark.parametrize(("floor", "drafts"), [(0.95, False), (0.0, True)])
def test_a_small_gain_is_not_worth_longer_steps(floor, drafts):
    report = _serve(SMALL_GAIN, slowest_request=floor)
    assert (np.count_nonzero(report.step_drafted) > 0.3 * report.steps) == drafts


def _cost_of_a_draft(users, **options):
    policy = GoodputPolicy(4, 16, confident_drafts=True, **options)
    states = [RequestState(str(number), 100, 100, 0.0, index=number) for number in range(users)]
    for state in states:
        policy.enter(state)
    for number in range(1, 40):
        lengths = policy.get_num_draft_tokens(UpcomingStep(states, 4, number=number))
        rows = users + sum(lengths)
        policy.observe(StepOutcome(states, lengths, lengths, rows, 0.01 + 0.002 * rows, users, number, max(lengths)))
    return policy.draft_cost().per_token


def test_drafts_with_a_confidence_that_delay_others_cost_a_fifth_more():
    bounded, unbounded = (_cost_of_a_draft(2, slowest_request=floor) for floor in (0.01, 0.0))
    assert bounded == pytest.approx(1.2 * unbounded)
    assert _cost_of_a_draft(1, slowest_request=0.01) == _cost_of_a_draft(1, slowest_request=0.0)


def test_a_clear_gain_is_worth_longer_steps():
    report = _serve([RequestClass(steady(0.95), output_tokens=(150, 150))], slowest_request=0.95)
    assert np.count_nonzero(report.step_drafted) > 0.8 * report.steps
