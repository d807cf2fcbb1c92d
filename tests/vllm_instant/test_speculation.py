"""The speculation budget without an engine."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant import RequestState, SpeculationPolicy
from vllm_instant.containment import Contained
from vllm_instant.speculation import SpeculationBudget


class Scripted(SpeculationPolicy):
    """Returns what the test says, and remembers what it is told."""

    def __init__(self, answer):
        self.answer = answer
        self.outcomes = []
        self.forgotten = []

    def draft_lengths(self, step):
        return self.answer(len(step.requests))

    def observe(self, outcome):
        self.outcomes.append(outcome)

    def forget(self, request_id):
        self.forgotten.append(request_id)


def _budget(answer, most=4):
    policy = Scripted(answer)
    return SpeculationBudget(Contained("speculation", "scripted", policy), most), policy


def _states(count):
    return [RequestState(f"r{i}", 10, 100, 0.0) for i in range(count)]


@given(lengths=st.lists(st.integers(0, 4), max_size=20))
def test_lawful_lengths_are_taken_as_they_are(lengths):
    budget, _ = _budget(lambda n: lengths)
    assert budget.plan(_states(len(lengths))) == lengths
    assert budget.counters.budgeted == sum(lengths)
    assert budget.counters.steps_without_drafting == (bool(lengths) and not sum(lengths))


@given(lengths=st.lists(st.integers(-3, 9), max_size=8), count=st.integers(1, 8))
def test_whatever_a_policy_returns_the_plan_is_lawful(lengths, count):
    budget, _ = _budget(lambda n: lengths)
    plan = budget.plan(_states(count))
    assert len(plan) == count
    assert all(0 <= k <= 4 for k in plan)
    lawful = len(lengths) == count and all(0 <= k <= 4 for k in lengths)
    assert budget.policy.disabled == (not lawful)
    if not lawful:
        assert plan == [4] * count, "vLLM's own behaviour takes over"


def test_one_log_record_names_plugin_slot_and_hook(caplog):
    budget, _ = _budget(lambda n: 1 / 0)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert budget.plan(_states(2)) == [4, 4]
    [record] = caplog.records
    for word in ("scripted", "speculation", "draft_lengths", "ZeroDivisionError"):
        assert word in record.getMessage()
    assert budget.policy.failures == {"draft_lengths": 1}


def test_a_disabled_policy_is_not_called_again():
    calls = []
    budget, policy = _budget(lambda n: calls.append(n) or 1 / 0)
    budget.plan(_states(1))
    budget.plan(_states(1))
    budget.step_finished(0, _states(1), [2], [1], num_scheduled_tokens=3)
    assert calls == [1]
    assert policy.outcomes == []


def test_outcomes_are_counted_and_shown():
    budget, policy = _budget(lambda n: [2] * n)
    states = _states(2)
    budget.plan(states)
    budget.step_scheduled(7)
    budget.step_finished(7, states, [2, 2], [1, 0], num_scheduled_tokens=6)
    assert (budget.counters.proposed, budget.counters.accepted) == (4, 1)
    [outcome] = policy.outcomes
    assert outcome.accepted == [1, 0]
    assert outcome.num_scheduled_tokens == 6
    assert outcome.seconds > 0


def test_requests_are_forgotten_once():
    budget, policy = _budget(lambda n: [0] * n)
    [state] = _states(1)
    budget.admit(state)
    assert budget.states["r0"] is state
    budget.forget("r0")
    budget.forget("r0")
    assert "r0" not in budget.states
    assert policy.forgotten == ["r0"]


@pytest.mark.parametrize("failing", ["observe", "forget"])
def test_failures_elsewhere_are_contained_too(failing):
    budget, policy = _budget(lambda n: [1] * n)
    setattr(policy, failing, lambda *_: 1 / 0)
    [state] = _states(1)
    budget.admit(state)
    budget.step_finished(0, [state], [1], [1], num_scheduled_tokens=2)
    budget.forget("r0")
    assert budget.policy.failures == {failing: 1}
    assert budget.plan([state]) == [4]
