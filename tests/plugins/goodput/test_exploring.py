"""What may be explored when, and what is explored."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.goodput.exploration import Explorer, Situation
from vllm_instant_plugins.goodput.exploration_budget import (
    ALLOWANCE_PER_STEP,
    MAX_ALLOWANCE,
    MAX_SILENCE,
    SHORTEST_SILENCE,
    ExplorationBudget,
)
from vllm_instant_plugins.goodput.planner import choose


def _after(steps):
    allowance = ExplorationBudget()
    for _ in range(steps):
        allowance.step()
    return allowance


class TestAllowance:
    def test_it_grows_by_the_step_up_to_a_bound(self):
        assert _after(10).left == pytest.approx(10 * ALLOWANCE_PER_STEP)
        assert _after(10_000).left == MAX_ALLOWANCE

    def test_nothing_is_taken_that_is_not_there(self):
        allowance = _after(10)
        assert not allowance.take("a", 11 * ALLOWANCE_PER_STEP)
        assert allowance.take("a", 9 * ALLOWANCE_PER_STEP)
        assert allowance.left == pytest.approx(ALLOWANCE_PER_STEP)

    def test_each_kind_is_silent_for_a_while(self):
        allowance = _after(100)
        assert allowance.take("a", 0.0)
        assert not allowance.take("a", 0.0)
        assert allowance.take("b", 0.0)
        for _ in range(SHORTEST_SILENCE):
            allowance.step()
        assert allowance.take("a", 0.0)

    def test_what_must_be_is_done_after_the_longest_silence_even_without_allowance(self):
        allowance = ExplorationBudget()
        allowance.pay("a", 5.0)
        assert allowance.left == -MAX_ALLOWANCE
        for step in range(MAX_SILENCE):
            assert not allowance.take("a", 1.0, must=True), step
            allowance.step()
        assert allowance.due("a")
        assert allowance.take("a", 1.0, must=True)

    def test_saving_waits_until_it_must(self):
        allowance = _after(1000)
        allowance.pay("a", 0.0)
        for _ in range(MAX_SILENCE - 1):
            allowance.step()
            assert not allowance.take("a", 0.0, must=True, saving=True)
        allowance.step()
        assert allowance.take("a", 0.0, must=True, saving=True)

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), max_size=300))
    def test_what_is_taken_never_exceeds_what_was_given(self, wishes):
        allowance, taken = ExplorationBudget(), 0.0
        for what, loss in wishes:
            allowance.step()
            if allowance.take(what, loss):
                taken += loss
        assert taken <= len(wishes) * ALLOWANCE_PER_STEP + 1e-9


def _costs(row=0.0, base=0.02, unsure=0.0):
    """Linear costs, known exactly except where ``unsure`` gives all other sizes than the smallest a deviation."""
    costs = StepCosts(64)
    count = len(costs.knots)
    costs.weights[:count] = base + row * costs.knots
    costs._covariance[:] = 0.0
    costs._covariance[range(4, count), range(4, count)] = unsure**2
    costs.observations = 100
    return costs


def _situation(costs, acceptance, requests=4, positions=4):
    believed = np.cumprod(np.full((requests, positions), acceptance), axis=1)
    best = functools.partial(choose, costs=costs, context=0.0, max_rows=1e9)
    everyone = np.arange(requests)
    return Situation(1, everyone, everyone, 0.0, 0.0, believed, best, best(believed), positions)


def _rich(costs):
    explorer = Explorer(costs)
    for _ in range(1000):
        explorer.allowance.step()
    for index in range(8):
        explorer.enter(index, 0.0)
    return explorer


class TestExplorer:
    def test_a_plan_of_uncertain_cost_is_tried_only_if_it_may_be_the_best(self):
        steep = _costs(row=0.02)
        now = _situation(steep, 0.3)
        assert now.choice.draft_tokens == 0
        assert _rich(steep).uncertain(now, True) is None
        vague = _costs(row=0.02, unsure=0.08)
        tried = _rich(vague).uncertain(_situation(vague, 0.6), True)
        assert tried is not None
        assert tried.draft_tokens > 0
        # What it is expected to take is what is estimated, not what is hoped for.
        assert tried.seconds == pytest.approx(0.02 + 0.02 * (4 + tried.draft_tokens))

    def test_whether_drafting_pays_at_all_is_found_out_first(self):
        """Also where it seems to bring much more: what a step without drafts takes is not known at all."""
        costs = _costs(row=0.0005, unsure=0.02)
        now = _situation(costs, 0.6)
        assert now.choice.gain > 1.5
        off = len(now.indices)
        at = int(np.flatnonzero(costs.knots == off)[0])
        assert _rich(costs).while_drafting(now)[1] == "draft"
        assert _rich(costs).uncertain(now, True) is not None
        costs._covariance[at, at] = (0.35 * costs.weights[at]) ** 2
        assert _rich(costs).while_drafting(now)[1] == "reference"
        assert _rich(costs).uncertain(now, True) is None
        assert _rich(costs).uncertain(now, False) is not None

    def test_about_even_is_no_doubt_once_a_step_without_drafts_is_known(self):
        costs = _costs(row=0.0005, unsure=0.02)
        now = _situation(costs, 0.6)
        at = int(np.flatnonzero(costs.knots == len(now.indices))[0])
        costs._covariance[at, at] = (0.015 * costs.weights[at]) ** 2
        even = replace(now, choice=replace(now.choice, seconds=now.choice.seconds * now.choice.gain / 1.01))
        assert 1.0 < even.choice.gain < 1.02
        assert _rich(costs).uncertain(even, True) is not None

    def test_without_allowance_nothing_is_tried(self):
        vague = _costs(row=0.02, unsure=0.08)
        explorer = _rich(vague)
        explorer.allowance.left = -0.1
        assert explorer.uncertain(_situation(vague, 0.6), True) is None

    def test_a_step_for_all_is_tried_where_it_shows_more_than_a_probe(self):
        # A row costs a fifth of a step: drafting for four loses a little at acceptance 0.35, and is seen four times.
        costs = _costs(row=0.0025, base=0.01)
        now = _situation(costs, 0.45)
        assert now.choice.draft_tokens == 0
        trial = _rich(costs).trial(now)
        assert trial is not None
        assert (trial.lengths > 0).sum() == 4
        assert trial.tokens == pytest.approx(4 + 4 * 0.45, rel=0.3)
        # One request shows no more than a probe of it.
        assert _rich(costs).trial(_situation(costs, 0.45, requests=1)) is None
        # Hopeless drafts would lose too much.
        assert _rich(costs).trial(_situation(costs, 0.01)) is None

    def test_while_it_saves_for_a_trial_it_does_not_probe(self):
        costs = _costs(row=0.0025, base=0.01)
        explorer, now = _rich(costs), _situation(costs, 0.45)
        explorer.allowance.pay("drafter", 0.0)
        for _ in range(SHORTEST_SILENCE):
            explorer.allowance.step()
        explorer.allowance.left = 0.01
        assert explorer.trial(now) is None
        explorer.allowance.left = 1.0
        assert explorer.while_off(now)[1] == "off"
        for _ in range(MAX_SILENCE):
            explorer.allowance.step()
        assert explorer.trial(now) is not None

    def test_the_request_that_drafted_longest_ago_is_probed(self):
        costs = _costs(row=0.02)
        explorer, now = _rich(costs), _situation(costs, 0.05)
        explorer.drafted(np.arange(4), np.array([1, 1, 0, 1]), 7)
        lengths, reason = explorer.while_off(now)
        assert reason == "probe"
        assert np.flatnonzero(lengths).tolist() == [2]

    def test_reading_what_was_missed_counts_as_loss(self):
        costs = _costs(row=0.002)
        costs.weights[-2] = 0.1  # seconds for each 128 tokens
        explorer, now = _rich(costs), _situation(costs, 0.05)
        explorer.allowance.left = 0.5
        explorer.not_drafted(np.arange(4), np.full(4, 999))
        assert explorer.while_off(now)[1] == "off"
        assert explorer.drafted(np.arange(4), np.full(4, 2), 3) == (4000, 8)
        assert explorer.while_off(now)[1] == "probe"

    def test_only_what_comes_while_the_drafter_is_off_for_a_request_is_missed(self):
        explorer = _rich(_costs())
        explorer.not_drafted(np.arange(3), np.array([0, 2, 4]))
        explorer.not_all_drafted(np.arange(3), np.array([1, 0, 0]))
        assert explorer.drafted(np.arange(3), np.array([3, 0, 1]), 2) == (1 + 6, 4)
        assert explorer.drafted(np.arange(3), np.array([1, 1, 1]), 3) == (4, 3)

    def test_steps_without_drafts_are_measured_again_when_their_time_is_vague(self):
        costs = _costs(row=0.0001)
        now = _situation(costs, 0.4)
        assert 1.0 < now.choice.gain
        sure = _rich(costs).while_drafting(now)
        assert sure[1] == "draft"
        cheap = _costs(row=0.004, base=0.01)
        now = _situation(cheap, 0.75)
        assert 1.0 < now.choice.gain < 1.5
        cheap._covariance[:] = (0.05 * 0.026) ** 2
        assert _rich(cheap).while_drafting(now)[1] == "reference"
        cheap._covariance[:] = 0.0
        assert _rich(cheap).while_drafting(now)[1] == "draft"
