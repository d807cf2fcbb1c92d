"""When something is explored, and what."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant import FullGraphs, RequestState
from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.goodput.exploration import (
    BUDGET_PER_STEP,
    LONG_INTERVAL,
    MAX_BUDGET,
    MAX_INTERVAL,
    MIN_INTERVAL,
    ExplorationBudget,
    Explorer,
    StepContext,
)
from vllm_instant_plugins.goodput.request_table import RequestTable


def _after(steps):
    budget = ExplorationBudget()
    for _ in range(steps):
        budget.step()
    return budget


class TestExplorationBudget:
    def test_it_grows_by_the_step_up_to_a_bound(self):
        assert _after(10).balance == pytest.approx(10 * BUDGET_PER_STEP)
        assert _after(10_000).balance == MAX_BUDGET

    def test_nothing_is_spent_beyond_the_balance(self):
        budget = _after(10)
        assert not budget.try_spend("a", 11 * BUDGET_PER_STEP)
        assert budget.try_spend("a", 9 * BUDGET_PER_STEP)
        assert budget.balance == pytest.approx(BUDGET_PER_STEP)

    def test_each_kind_waits_for_its_interval(self):
        budget = _after(100)
        assert budget.try_spend("a", 0.0)
        assert not budget.try_spend("a", 0.0)
        assert budget.try_spend("b", 0.0)
        for _ in range(MIN_INTERVAL):
            budget.step()
        assert budget.try_spend("a", 0.0)

    def test_what_must_be_explored_is_explored_after_the_longest_interval_even_without_budget(self):
        budget = ExplorationBudget()
        budget.spend("a", 5.0)
        assert budget.balance == -MAX_BUDGET
        for step in range(MAX_INTERVAL):
            assert not budget.try_spend("a", 1.0, must=True), step
            budget.step()
        assert budget.is_due("a")
        assert budget.try_spend("a", 1.0, must=True)

    def test_saving_waits_until_it_must(self):
        budget = _after(1000)
        budget.spend("a", 0.0)
        for _ in range(MAX_INTERVAL - 1):
            budget.step()
            assert not budget.try_spend("a", 0.0, must=True, saving=True)
        budget.step()
        assert budget.try_spend("a", 0.0, must=True, saving=True)

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), max_size=300))
    def test_what_is_spent_never_exceeds_what_was_added(self, wishes):
        budget, taken = ExplorationBudget(), 0.0
        for what, loss in wishes:
            budget.step()
            if budget.try_spend(what, loss):
                taken += loss
        assert taken <= len(wishes) * BUDGET_PER_STEP + 1e-9


def _costs(row=0.0, base=0.02, unsure=0.0):
    """Linear costs, known exactly except where ``unsure`` gives all other sizes than the smallest a deviation."""
    costs = StepCosts(64)
    count = len(costs.knots)
    costs.weights[:count] = base + row * costs.knots
    costs._covariance[:] = 0.0
    costs._covariance[range(4, count), range(4, count)] = unsure**2
    costs.observations = 100
    return costs


def _context(costs, acceptance, requests=4, positions=4):
    survival = np.cumprod(np.full((requests, positions), acceptance), axis=1)
    batch = RequestTable().batch([_state(index) for index in range(requests)])
    now = StepContext(100, batch, costs, 0.0, survival, survival[:, 0], positions, max_rows=1e9)
    now.plan = now.best(survival)
    return now


def _state(index):
    return RequestState(f"r{index}", 0, 100, 0.0, index=index)


def _rich(costs, table=None):
    """An explorer that has saved its whole budget."""
    table = RequestTable() if table is None else table
    explorer = Explorer(costs, table)
    for _ in range(1000):
        explorer.budget.step()
    for index in range(8):
        table.enter(_state(index), 0)
    return explorer


class TestExplorer:
    def test_a_plan_of_uncertain_cost_is_tried_only_if_it_may_be_the_best(self):
        steep = _costs(row=0.02)
        now = _context(steep, 0.3)
        assert now.plan.total_draft_tokens == 0
        assert _rich(steep).uncertain_cost(now, True) is None
        vague = _costs(row=0.02, unsure=0.08)
        tried = _rich(vague).uncertain_cost(_context(vague, 0.6), True)
        assert tried is not None
        assert tried.total_draft_tokens > 0
        # Its expected time is the estimate, not the optimistic one.
        assert tried.seconds == pytest.approx(0.02 + 0.02 * (4 + tried.total_draft_tokens))

    def test_whether_drafting_pays_at_all_is_measured_first(self):
        """Also where the gain seems large: the time of a step without drafts is not known at all."""
        costs = _costs(row=0.0005, unsure=0.02)
        now = _context(costs, 0.6)
        assert now.plan.gain > 1.5
        off = now.plan.num_requests
        at = int(np.flatnonzero(costs.knots == off)[0])
        assert _rich(costs).while_drafting(now)[1] == "draft"
        assert _rich(costs).uncertain_cost(now, True) is not None
        costs._covariance[at, at] = (0.35 * costs.weights[at]) ** 2
        assert _rich(costs).while_drafting(now)[1] == "reference"
        assert _rich(costs).uncertain_cost(now, True) is None
        assert _rich(costs).uncertain_cost(now, False) is not None

    def test_about_even_is_no_doubt_once_a_step_without_drafts_is_known(self):
        costs = _costs(row=0.0005, unsure=0.02)
        now = _context(costs, 0.6)
        at = int(np.flatnonzero(costs.knots == now.plan.num_requests)[0])
        costs._covariance[at, at] = (0.015 * costs.weights[at]) ** 2
        now.plan = replace(now.plan, seconds=now.plan.seconds * now.plan.gain / 1.01)
        assert 1.0 < now.plan.gain < 1.02
        assert _rich(costs).uncertain_cost(now, True) is not None

    def test_without_budget_nothing_is_tried(self):
        vague = _costs(row=0.02, unsure=0.08)
        explorer = _rich(vague)
        explorer.budget.balance = -0.1
        assert explorer.uncertain_cost(_context(vague, 0.6), True) is None

    def test_a_step_for_all_is_tried_where_it_shows_more_than_a_probe(self):
        # A row costs a fifth of a step: drafting for four loses a little at acceptance 0.35, and is seen four times.
        costs = _costs(row=0.0025, base=0.01)
        now = _context(costs, 0.45)
        assert now.plan.total_draft_tokens == 0
        trial = _rich(costs).trial(now)
        assert trial is not None
        assert (trial.num_draft_tokens > 0).sum() == 4
        assert trial.tokens == pytest.approx(4 + 4 * 0.45, rel=0.3)
        # One request shows no more than a probe of it.
        assert _rich(costs).trial(_context(costs, 0.45, requests=1)) is None
        # Hopeless drafts would lose too much.
        assert _rich(costs).trial(_context(costs, 0.01)) is None

    def test_while_it_saves_for_a_trial_it_does_not_probe(self):
        costs = _costs(row=0.0025, base=0.01)
        explorer, now = _rich(costs), _context(costs, 0.45)
        explorer.budget.spend("drafter", 0.0)
        for _ in range(MIN_INTERVAL):
            explorer.budget.step()
        explorer.budget.balance = 0.01
        assert explorer.trial(now) is None
        explorer.budget.balance = 1.0
        assert explorer.while_off(now)[1] == "off"
        for _ in range(MAX_INTERVAL):
            explorer.budget.step()
        assert explorer.trial(now) is not None

    def test_the_request_that_drafted_longest_ago_is_probed(self):
        costs = _costs(row=0.02)
        table, now = RequestTable(), _context(costs, 0.05)
        explorer = _rich(costs, table)
        table.grant(now.batch, np.array([1, 1, 0, 1]), 7)
        num_draft_tokens, reason = explorer.while_off(now)
        assert reason == "probe"
        assert np.flatnonzero(num_draft_tokens).tolist() == [2]

    def test_reading_uncached_tokens_counts_as_loss(self):
        costs = _costs(row=0.002)
        costs.weights[-3] = 0.1  # seconds for each 128 tokens
        table, now = RequestTable(), _context(costs, 0.05)
        explorer = _rich(costs, table)
        explorer.budget.balance = 0.5
        table.drafter_was_off(now.batch, np.full(4, 999))
        assert explorer.while_off(now)[1] == "off"
        assert table.grant(now.batch, np.full(4, 2), 3) == (512, 8)
        assert explorer.while_off(now)[1] == "probe"

    def test_steps_without_drafts_are_measured_again_when_their_time_is_uncertain(self):
        costs = _costs(row=0.0001)
        now = _context(costs, 0.4)
        assert 1.0 < now.plan.gain
        sure = _rich(costs).while_drafting(now)
        assert sure[1] == "draft"
        cheap = _costs(row=0.004, base=0.01)
        now = _context(cheap, 0.75)
        assert 1.0 < now.plan.gain < 1.5
        at = int(np.flatnonzero(cheap.knots == now.plan.num_requests)[0])
        cheap._covariance[at, at] = (0.2 * cheap.weights[at]) ** 2
        assert _rich(cheap).while_drafting(now)[1] == "reference"
        cheap._covariance[:] = 0.0
        assert _rich(cheap).while_drafting(now)[1] == "draft"


class TestWithGraphs:
    GRAPHS = FullGraphs((0, 2, 4), 64)

    def _off(self, graphs, requests=4):
        costs = _costs(row=0.001)
        costs.weights[len(costs.knots) + 8] = 0.002
        now = replace(_context(costs, 0.0, requests), graphs=graphs)
        now.plan = now.best(now.survival)
        return _rich(costs).while_off(now)

    def test_a_probe_is_a_step_of_the_smallest_number_that_has_a_graph(self):
        probe, reason = self._off(self.GRAPHS)
        assert (probe.tolist(), reason) == ([2, 2, 2, 2], "probe")

    def test_without_graphs_one_request_is_probed(self):
        probe, _ = self._off(None)
        assert np.count_nonzero(probe) == 1

    def test_where_no_step_with_drafts_has_a_graph_one_request_is_probed(self):
        for graphs in (FullGraphs((0,), 64), FullGraphs((0, 2, 4), 8)):
            probe, _ = self._off(graphs)
            assert np.count_nonzero(probe) == 1


def test_a_long_exploration_may_be_followed_up_once():
    budget = ExplorationBudget()
    assert budget.may_be_long()
    budget.was_long()
    assert not budget.may_be_long()
    assert budget.may_be_long(follow_up=True)
    budget.was_long()
    assert not budget.may_be_long(follow_up=True)
    for _ in range(2 * LONG_INTERVAL - 1):
        budget.step()
    assert not budget.may_be_long()
    budget.step()
    assert budget.may_be_long()
