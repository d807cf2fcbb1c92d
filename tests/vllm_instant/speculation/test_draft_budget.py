"""Draft budgets without an engine."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant import FullGraphs, RequestState, SpeculationPolicy
from vllm_instant.deployment.circuit_breaker import GuardedPlugin
from vllm_instant.speculation.draft_budget import (
    FIRST_STEPS,
    MAX_HELD_SHARE,
    DraftBudgetManager,
    requested_num_draft_tokens,
)
from vllm_instant.speculation.draft_plan import DraftReport


class Scripted(SpeculationPolicy):
    """Returns the given draft budgets and records its calls."""

    def __init__(self, answer):
        self.answer = answer
        self.outcomes = []
        self.forgotten = []

    def get_num_draft_tokens(self, step):
        return self.answer(len(step.requests))

    def observe(self, outcome):
        self.outcomes.append(outcome)

    def forget(self, request_id):
        self.forgotten.append(request_id)


def _budget(answer, most=4):
    policy = Scripted(answer)
    return DraftBudgetManager(GuardedPlugin("speculation", "scripted", policy), most), policy


def _states(count):
    return [RequestState(f"r{i}", 10, 100, 0.0) for i in range(count)]


@given(lengths=st.lists(st.integers(0, 4), max_size=20))
def test_valid_draft_budgets_are_used_unchanged(lengths):
    budget, _ = _budget(lambda n: lengths)
    assert budget.plan(_states(len(lengths))) == lengths
    assert budget.counters.budgeted == sum(lengths)
    assert budget.counters.steps_without_drafting == (bool(lengths) and not sum(lengths))


@given(lengths=st.lists(st.integers(-3, 9), max_size=8), count=st.integers(1, 8))
def test_the_plan_is_valid_whatever_a_policy_returns(lengths, count):
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
    for word in ("scripted", "speculation", "get_num_draft_tokens", "ZeroDivisionError"):
        assert word in record.getMessage()
    assert budget.policy.failures == {"get_num_draft_tokens": 1}


def test_a_disabled_policy_is_not_called_again():
    calls = []
    budget, policy = _budget(lambda n: calls.append(n) or 1 / 0)
    budget.plan(_states(1))
    budget.plan(_states(1))
    budget.step_finished(0, _states(1), [2], [1], num_scheduled_tokens=3)
    assert calls == [1]
    assert policy.outcomes == []


def test_outcomes_are_counted_and_observed():
    budget, policy = _budget(lambda n: [2] * n)
    states = _states(2)
    budget.plan(states)
    budget.step_scheduled(7)
    budget.step_finished(7, states, [2, 2], [1, 0], num_scheduled_tokens=6)
    assert policy.outcomes == [], "the policy sees it when there is time"
    budget.on_model_executing()
    assert (budget.counters.proposed, budget.counters.accepted) == (4, 1)
    [outcome] = policy.outcomes
    assert outcome.accepted == [1, 0]
    assert outcome.num_scheduled_tokens == 6
    assert outcome.seconds > 0


def test_a_draft_report_belongs_to_the_step_that_finished_last():
    budget, policy = _budget(lambda n: [2] * n)
    states = _states(1)
    budget.plan(states)
    budget.step_finished(1, states, [0], [0], num_scheduled_tokens=1, draft_steps=2)
    budget.step_finished(2, states, [2], [1], num_scheduled_tokens=3, draft_steps=2)
    budget.on_draft_report(DraftReport(draft_steps=1, uncached_tokens=40))
    budget.on_model_executing()
    assert [(outcome.draft_steps, outcome.uncached_tokens) for outcome in policy.outcomes] == [(2, None), (1, 40)]


def test_outcomes_of_an_ended_request_are_observed_before_its_index_is_reused():
    budget, policy = _budget(lambda n: [1] * n)
    first, second = _states(2)
    seen = []
    policy.enter = lambda state: seen.append((state.request_id, len(policy.outcomes)))
    budget.admit(first)
    budget.step_finished(0, [first], [1], [1], num_scheduled_tokens=2)
    budget.forget("r0")
    budget.admit(second)
    assert second.index == first.index
    assert seen == [("r0", 0), ("r1", 1)]


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
def test_failures_in_every_method_disable_the_policy(failing):
    budget, policy = _budget(lambda n: [1] * n)
    setattr(policy, failing, lambda *_: 1 / 0)
    [state] = _states(1)
    budget.admit(state)
    budget.step_finished(0, [state], [1], [1], num_scheduled_tokens=2)
    budget.on_model_executing()
    budget.forget("r0")
    assert budget.policy.failures == {failing: 1}
    assert budget.plan([state]) == [4]


def _asked(budget):
    """Records the requests of each call."""
    questions = []
    answer = budget.policy.instance.get_num_draft_tokens

    def counting(step):
        questions.append([request.request_id for request in step.requests])
        return answer(step)

    budget.policy.instance.get_num_draft_tokens = counting
    return questions


def _served(budget):
    """The budget after the first steps of a server, which are not planned ahead."""
    for _ in range(FIRST_STEPS):
        budget.plan([])
    return budget


def test_the_next_plan_is_made_while_the_model_runs():
    budget = _served(_budget(lambda n: [3] * n)[0])
    states = _states(2)
    for state in states:
        budget.admit(state)
    questions = _asked(budget)
    budget.plan(states)
    budget.on_model_executing()
    assert questions == [["r0", "r1"]] * 2
    assert budget.plan(states) == [3, 3]
    assert len(questions) == 2, "the plan was there already"


def test_a_new_server_is_planned_with_the_outcome_of_the_step_before_and_later_one_step_ahead():
    budget, policy = _budget(lambda n: [len(policy.outcomes)] * n, most=100)
    states = _states(1)
    plans = []
    for step in range(FIRST_STEPS + 4):
        plans += budget.plan(states)
        budget.step_scheduled(step)
        budget.on_model_executing()
        budget.step_finished(step, states, [0], [0], num_scheduled_tokens=1)
    assert plans == [*range(FIRST_STEPS), *range(FIRST_STEPS - 1, FIRST_STEPS + 3)]


def test_a_request_that_ended_does_not_spoil_the_plan_and_a_new_one_makes_a_new_plan():
    budget = _served(_budget(lambda n: [n] * n)[0])
    first, second, third = _states(3)
    for state in (first, second):
        budget.admit(state)
    questions = _asked(budget)
    budget.plan([first, second])
    budget.on_model_executing()
    budget.forget("r0")
    assert budget.plan([second]) == [2]
    budget.on_model_executing()
    budget.admit(third)
    assert budget.plan([second, third]) == [2, 2]
    assert questions == [["r0", "r1"], ["r0", "r1"], ["r1"], ["r1", "r2"]]


def test_indices_are_small_unique_and_reused():
    budget, _ = _budget(lambda n: [0] * n)
    states = _states(6)
    for state in states[:4]:
        budget.admit(state)
    assert sorted(state.index for state in states[:4]) == [0, 1, 2, 3]
    budget.forget("r1")
    budget.admit(states[4])
    budget.admit(states[5])
    assert states[4].index == 1
    assert states[5].index == 4


@pytest.mark.parametrize(
    ("wish", "length"), [(None, 3), ("auto", 3), ("off", 0), (0, 0), (2, 2), (4, 4), (77, 4), ("nonsense", 3)]
)
def test_the_number_of_draft_tokens_that_a_client_fixes(wish, length):
    budget, _ = _budget(lambda n: [3] * n)
    state = RequestState("r", 1, 1, 0.0, extra_args={} if wish is None else {"instant_speculation": wish})
    other = RequestState("other", 1, 1, 0.0)
    budget.admit(state)
    budget.admit(other)
    assert budget.plan([state, other]) == [length, 3]


@pytest.mark.parametrize("wish", [-1, 1.5, True, "on", [2]])
def test_an_invalid_number_of_a_client_is_refused_in_one_sentence(wish):
    with pytest.raises(ValueError, match='must be "off", "auto" or a whole number from 0, found'):
        requested_num_draft_tokens({"instant_speculation": wish})


def test_times_are_those_of_the_clock():
    now = [0.0]
    policy = Scripted(lambda n: [0] * n)
    budget = DraftBudgetManager(GuardedPlugin("speculation", "scripted", policy), 4, clock=lambda: now[0])
    states = _states(1)

    def step(number, begins, ends):
        now[0] = begins
        budget.step_begins()
        budget.plan(states)
        budget.step_scheduled(number)
        now[0] = ends
        budget.step_finished(number, states, [0], [0], num_scheduled_tokens=1)

    step(1, 10.0, 10.5)
    step(2, 10.7, 11.0)  # busy: the 0.2 s between the steps belong to the second
    budget.engine_idles()
    step(3, 20.0, 20.25)
    budget.on_model_executing()
    assert [outcome.seconds for outcome in policy.outcomes] == pytest.approx([0.5, 0.5, 0.25])
    assert [outcome.number for outcome in policy.outcomes] == [1, 2, 3]


def test_the_plan_has_cache_salts_only_of_requests_with_one():
    budget, _ = _budget(lambda n: [1] * n)
    states = [RequestState("a", 1, 1, 0.0, cache_salt="tenant"), RequestState("b", 1, 1, 0.0)]
    for state in states:
        budget.admit(state)
    assert budget.plan_drafts(states).cache_salts == {"a": "tenant"}
    budget.forget("a")
    plan = budget.plan_drafts(states[1:])
    assert plan.cache_salts == {}
    assert plan.num_draft_tokens == {"b": 1}


def test_a_list_that_its_owner_changes_is_read_again():
    budget = _served(_budget(lambda n: [n] * n)[0])
    states = _states(3)
    for state in states:
        budget.admit(state)
    assert budget.plan_drafts(states).num_draft_tokens == {"r0": 3, "r1": 3, "r2": 3}
    budget.on_model_executing()
    del states[1]
    assert budget.plan_drafts(states).num_draft_tokens == {"r0": 3, "r2": 3}


class UpToTheLimit(SpeculationPolicy):
    """Grants what a step allows, and records the steps."""

    def __init__(self):
        self.asked = []

    def get_num_draft_tokens(self, step):
        self.asked.append((step.number, step.max_draft_tokens))
        return [step.max_draft_tokens] * len(step.requests)


def _granting():
    policy = UpToTheLimit()
    return DraftBudgetManager(GuardedPlugin("speculation", "granting", policy), 4), policy


def test_a_draft_model_waits_for_first_tokens_and_the_policy_knows():
    budget, policy = _granting()
    _served(budget)
    states = _states(2)
    states[1].fixed_num_draft_tokens = 3
    plan = budget.plan_drafts(states, hold_model=True, only_model=True)
    assert plan.num_draft_tokens == {"r0": 0, "r1": 0}
    assert not plan.draft_model_runs
    budget.on_model_executing()
    assert policy.asked == [(FIRST_STEPS + 1, 0), (FIRST_STEPS + 2, 4)]
    plan = budget.plan_drafts(states)
    assert plan.num_draft_tokens["r0"] == 4
    assert plan.draft_model_runs
    budget.on_model_executing()
    # What was planned ahead holds for no step that reads a prompt.
    assert budget.plan_drafts(states, hold_model=True, only_model=True).num_draft_tokens == {"r0": 0, "r1": 0}
    assert policy.asked[-2:] == [(FIRST_STEPS + 3, 4), (FIRST_STEPS + 3, 0)]
    assert not budget.policy.disabled


def test_a_policy_that_ignores_the_limit_of_such_a_step_is_not_disabled():
    budget, _ = _budget(lambda n: [2] * n)
    assert budget.plan_drafts(_states(2), hold_model=True, only_model=True).num_draft_tokens == {"r0": 0, "r1": 0}
    assert not budget.policy.disabled


def test_other_sources_draft_while_the_draft_model_waits():
    budget, _ = _granting()
    plan = budget.plan_drafts(_states(1), hold_model=True)
    assert plan.num_draft_tokens == {"r0": 4}
    assert not plan.draft_model_runs


def test_a_draft_model_waits_in_a_bounded_share_of_the_steps():
    budget, _ = _granting()
    held = [not budget.plan_drafts(_states(1), hold_model=True, only_model=True).draft_model_runs for _ in range(600)]
    assert held[0]
    assert sum(held[200:]) / 400 == pytest.approx(MAX_HELD_SHARE, abs=0.03)


def test_decoding_steps_are_counted_by_whether_they_ran_as_one_cuda_graph():
    policy = GuardedPlugin("speculation", "scripted", Scripted(lambda n: [0] * n))
    budget = DraftBudgetManager(policy, 4, graphs=FullGraphs((0, 2, 4), 12))
    states = _states(3)
    for drafted, prompts in (
        ([0, 0, 0], 0),
        ([2, 2, 2], 0),
        ([1, 1, 1], 0),
        ([2, 2, 0], 0),
        ([4, 4, 4], 0),
        ([2, 2, 2], 7),
    ):
        rows = 3 + sum(drafted) + prompts
        budget.step_finished(0, states, drafted, [0, 0, 0], num_scheduled_tokens=rows)
    assert budget.counters.full_graph_steps == 2
    # Numbers without a graph, numbers that differ, and more rows than any graph; a step with prompts is neither.
    assert budget.counters.piecewise_steps == 3


class TrimsOddSteps(UpToTheLimit):
    """Lets vLLM trim the drafts that steps with odd numbers make."""

    def get_num_draft_tokens(self, step):
        self.number = step.number
        return super().get_num_draft_tokens(step)

    def trims_verification(self):
        return self.number % 2 == 1

    def observe(self, outcome):
        self.outcomes.append((outcome.number, outcome.trimmed))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("ahead", [True, False])
def test_the_step_that_verifies_drafts_is_trimmed_as_decided_when_they_were_planned(enabled, ahead):
    policy = TrimsOddSteps()
    policy.outcomes = []
    guarded = GuardedPlugin("speculation", "scripted", policy)
    budget = _served(DraftBudgetManager(guarded, 4, adaptive_verification=enabled))
    states = _states(2)
    trims = []
    steps = range(FIRST_STEPS + 1, FIRST_STEPS + 7)
    for step in steps:
        plan = budget.plan_drafts(states)
        trims.append(plan.trims_verification)
        budget.step_scheduled(step)
        if ahead:
            budget.on_model_executing()
        budget.step_finished(step, states, [4, 4], [0, 0], num_scheduled_tokens=10)
    budget.on_model_executing()
    after_odd_steps = [step % 2 == 0 for step in steps]
    assert trims[1:] == (after_odd_steps[1:] if enabled else [False] * 5)
    assert policy.outcomes[1:] == list(zip(steps[1:], trims[1:], strict=True))
