"""The simulator: it must be right where the answer is known."""

import pytest

from vllm_instant import SpeculationPolicy
from vllm_instant.tools.measure.simulator import (
    HostNoise,
    RequestClass,
    StepCost,
    roofline,
    simulate,
    steady,
    switching,
)
from vllm_instant_plugins.speculation import Fixed

FLAT = StepCost([(1, 0.010), (1000, 0.010)])


def _run(length, chance=1.0, cost=FLAT, users=1, **options):
    return simulate(
        lambda clock: Fixed(length, None),
        [RequestClass(steady(chance), output_tokens=(100, 100))],
        cost,
        concurrency=users,
        requests=20,
        noise=HostNoise(jitter=0.0),
        **options,
    )


def test_without_drafts_one_token_a_step():
    report = _run(0, users=4)
    assert report.tokens_per_second == pytest.approx(4 / 0.010)
    assert report.tokens == 2000


def test_perfect_drafts_bring_their_length_more():
    report = _run(4)
    # The first token comes alone; the last step of an answer may be cut short.
    assert report.tokens_per_second == pytest.approx(500, rel=0.06)
    assert report.accepted == report.drafted


def test_chance_decides():
    report = _run(1, chance=0.5)
    assert report.accepted / report.drafted == pytest.approx(0.5, abs=0.05)
    assert report.tokens_per_second == pytest.approx(150, rel=0.05)


def test_costs_count():
    expensive = StepCost([(1, 0.010), (2, 0.020), (3, 0.030)], draft_pass=0.005, draft_start=0.001)
    assert expensive.seconds(5, 0, 2, 1) == pytest.approx(0.050 + 0.011)
    assert _run(1, chance=0.0, cost=expensive).tokens_per_second == pytest.approx(1 / 0.026, rel=0.02)


def test_the_same_seed_is_the_same_run():
    first, second = (_run(2, chance=0.6, seed=5) for _ in range(2))
    assert (first.seconds, first.accepted) == (second.seconds, second.accepted)
    assert _run(2, chance=0.6, seed=6).accepted != first.accepted


def test_processes_change_at_their_step():
    process = switching(steady(1.0), steady(0.2), 10, 20)
    assert [process(step, 0) for step in (9, 10, 19, 20)] == [1.0, 0.2, 0.2, 1.0]


def test_feedback_arrives_late_but_with_the_right_times():
    seen = []

    class Watching(SpeculationPolicy):
        def get_num_draft_tokens(self, step):
            return [0] * len(step.requests)

        def observe(self, outcome):
            seen.append((outcome.number, round(outcome.seconds, 6)))

    for delay in (0, 2):
        seen.clear()
        simulate(
            lambda clock: Watching(),
            [RequestClass(steady(0.0), output_tokens=(50, 50))],
            FLAT,
            concurrency=1,
            requests=1,
            feedback_delay=delay,
            noise=HostNoise(jitter=0.0),
        )
        assert len(seen) == 50 - delay
        assert all(seconds == 0.010 for _, seconds in seen)


def test_a_policy_that_raises_is_an_error():
    with pytest.raises(RuntimeError, match="get_num_draft_tokens"):
        simulate(
            lambda clock: type("Broken", (Fixed,), {"get_num_draft_tokens": lambda self, step: 1 / 0})(1, None),
            [RequestClass(steady(1.0))],
            FLAT,
            concurrency=1,
            requests=2,
        )


def test_the_analytic_curve_has_steps_and_a_knee():
    cost = roofline(8e9)
    assert cost.seconds(1, 0, 0, 1) == cost.seconds(8, 0, 0, 1)
    assert cost.seconds(100, 0, 0, 1) == pytest.approx(cost.seconds(8, 0, 0, 1))
    assert cost.seconds(1000, 0, 0, 1) > 3 * cost.seconds(8, 0, 0, 1)


def test_a_drafter_that_was_off_first_reads_what_it_missed():
    slow = StepCost([(1, 0.01), (64, 0.01)], missed_second=1000.0)
    classes = [RequestClass(steady(0.0), prompt_tokens=100, output_tokens=(50, 50))]

    class Late(Fixed):
        def get_num_draft_tokens(self, step):
            return [1 if step.number == 20 else 0 for _ in step.requests]

    report = simulate(
        lambda clock: Late(1, None), classes, slow, concurrency=1, requests=1, noise=HostNoise(jitter=0.0)
    )
    assert report.step_seconds[19] == pytest.approx(0.01 + (100 + 19) / 1000)
    assert max(report.step_seconds[20:]) == pytest.approx(0.01)
