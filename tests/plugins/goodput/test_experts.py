"""Distinct experts in the cost model: learned from counts, and what follows for drafts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_instant.interfaces.experts import ExpertCount
from vllm_instant.tools.measure.simulator import HostNoise, RequestClass, StepCost, simulate, steady
from vllm_instant_plugins.goodput.costs import StepCosts
from vllm_instant_plugins.goodput.experts import ExpertUse
from vllm_instant_plugins.goodput.policy import GoodputPolicy

# Time that is all experts, as on a CPU: rows alone cost next to nothing.
ROWS = [(1, 0.004), (512, 0.006)]
OWN = StepCost(ROWS, expert_second=0.0008, draft_share=1.0)
SHARED = replace(OWN, draft_share=0.1)
LIKELY = [RequestClass(steady(0.7))]


@settings(max_examples=40, deadline=None)
@given(st.floats(0.3, 1.0), st.floats(0.05, 1.0), st.sampled_from([(64, 8), (128, 8), (8, 2)]), st.integers(0, 99))
def test_what_steps_use_is_learned(of_request, of_draft, shape, seed):
    experts, top_k = shape
    random = np.random.default_rng(seed)
    use = ExpertUse()

    def true(requests, drafts):
        return experts * (1 - (1 - top_k / experts) ** (of_request * requests + of_draft * drafts))

    for _ in range(300):
        requests, drafts = int(random.integers(1, 9)), int(random.integers(0, 13))
        noisy = true(requests, drafts) * random.normal(1, 0.01)
        use.observe(ExpertCount(requests, drafts, noisy, experts, top_k))
    for requests, drafts in ((1, 0), (2, 4), (6, 3)):
        assert use.share(requests, drafts) * experts == pytest.approx(true(requests, drafts), rel=0.12)


def test_nothing_is_added_for_dense_models():
    costs = StepCosts(64)
    for rows in (1, 4, 9, 16) * 30:
        costs.observe(costs.features(rows, 0.0, rows - 1, 0, 1), 0.01 + 0.001 * rows)
    assert costs.weights[-1] == 0.0
    rows = np.array([1.0, 5.0, 30.0])
    assert np.array_equal(costs.target_seconds(rows, 0.0), costs.target_seconds(rows, 0.0, requests=1))


def test_steps_of_as_many_rows_differ_by_their_experts():
    """Sixteen requests cost more than four with three drafts each, where those share experts."""
    random = np.random.default_rng(0)
    blind, seeing = StepCosts(64), StepCosts(64)
    for _ in range(600):
        requests = int(random.integers(1, 17))
        drafts = int(random.integers(0, 4)) * requests if requests < 9 else 0
        seconds = SHARED.seconds(requests + drafts, 0, 0, requests) * random.normal(1, 0.02)
        seeing.experts.observe(SHARED.experts(requests, drafts))
        for costs in (blind, seeing):
            costs.observe(costs.features(requests + drafts, 0.0, drafts, 0, requests), seconds)

    def off(costs):
        errors = []
        for requests, drafts in ((16, 0), (4, 12), (8, 0), (2, 6), (5, 15)):
            found = costs.estimate(costs.features(requests + drafts, 0.0, drafts, 0, requests))[0]
            errors.append(abs(found / SHARED.seconds(requests + drafts, 0, 0, requests) - 1))
        return max(errors)

    assert off(seeing) < 0.05
    assert off(blind) > 2 * off(seeing)


def _drafted_a_step(cost, users):
    report = simulate(
        lambda clock: GoodputPolicy(8, 32, clock=clock),
        LIKELY,
        cost,
        concurrency=users,
        requests=24 * users,
        warm_up_requests=8 * users,
        noise=HostNoise(),
    )
    return report.drafted / report.steps / users, report.tokens_per_second


@pytest.mark.parametrize("users", [1, 2])
def test_drafts_are_shorter_where_they_bring_experts_of_their_own(users):
    own, _ = _drafted_a_step(OWN, users)
    shared, _ = _drafted_a_step(SHARED, users)
    assert own < 0.6 * shared
