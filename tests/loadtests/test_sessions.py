"""Conversations and agents: what is planned, and in which order it is sent."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from vllm_instant_loadtests import schedule
from vllm_instant_loadtests.load_driver import split_requests
from vllm_instant_loadtests.scenario import ScenarioError, parse
from vllm_instant_loadtests.session_progress import ANSWER_OF, SessionProgress

TALK = {"kind": "talk", "prompts": "creative", "rate": 0.5, "session": {"turns": [2, 4], "think_seconds": [1, 3]}}
STEPS = [
    {"name": "plan", "max_tokens": 20},
    {"name": "search", "after": ["plan"], "parallel": 3, "pause_seconds": 0.5, "result_characters": 200},
    {"name": "answer", "after": ["search"], "text": "Answer now."},
]
AGENT = {"kind": "agent", "prompts": "creative", "rate": 0.5, "step": STEPS}


def planned(traffic, seed="0"):
    return schedule.scheduled_requests(parse({"title": "t", "seconds": 40, "traffic": [traffic]}, Path("s.toml")), seed)


def by_session(requests):
    found = {}
    for request in requests:
        found.setdefault(request.session, []).append(request)
    return list(found.values())


def test_turns_wait_for_each_other_and_carry_all_that_was_said():
    sessions = by_session(planned(TALK))
    assert len(sessions) > 8
    assert {len(turns) for turns in sessions} == {2, 3, 4}
    for turns in sessions:
        assert [request.turn for request in turns] == list(range(len(turns)))
        for before, request in itertools.pairwise(turns):
            assert request.after == [before.number]
            assert 1 <= request.pause <= 3
            quoted = {"role": "assistant", ANSWER_OF: before.number}
            assert request.body["messages"][:-1] == [*before.body["messages"], quoted]
        assert turns[0].after == []


def test_numbers_are_places_in_the_list():
    for traffic in (TALK, AGENT):
        requests = planned(traffic)
        assert [request.number for request in requests] == list(range(len(requests)))
        assert all(request.after == [] or max(request.after) < request.number for request in requests)


def test_parallel_calls_are_siblings_and_are_joined():
    for plan, *searches, answer in by_session(planned(AGENT)):
        assert [request.kind for request in (plan, answer)] == ["agent: plan", "agent: answer"]
        assert [request.after for request in searches] == [[plan.number]] * 3
        assert len({request.body["messages"][-1]["content"] for request in searches}) == 3
        assert all(len(request.body["messages"][-1]["content"]) > 200 for request in searches)
        assert answer.after == [request.number for request in searches]
        assert sum(ANSWER_OF in message for message in answer.body["messages"]) == 4
        assert answer.body["messages"][-1]["content"] == "Answer now."
        assert (plan.body["max_tokens"], {request.pause for request in searches}) == (20, {0.5})


def test_branches_are_taken_by_chance():
    steps = [STEPS[0], {**STEPS[1], "chance": 0.5}, {**STEPS[2], "after": ["plan"]}]
    with_search = [len(one) > 2 for one in by_session(planned({**AGENT, "rate": 4.0, "step": steps}))]
    assert 0.3 < sum(with_search) / len(with_search) < 0.7


def test_nothing_follows_a_step_that_did_not_take_place():
    steps = [STEPS[0], {**STEPS[1], "chance": 0.0}, STEPS[2]]
    assert {len(one) for one in by_session(planned({**AGENT, "step": steps}))} == {1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": STEPS}, "should have either a session or steps"),
        ({"route": "completions"}, "the sessions of 'talk' need the route chat, not 'completions'"),
        ({"prompts": ""}, "the traffic 'talk' has no prompts"),
        ({"session": None, "step": [STEPS[1]]}, "the step 'search' of 'talk' comes after 'plan', which is no earlier"),
        ({"session": None, "step": [STEPS[0], STEPS[0]]}, "the step 'plan' of 'talk' is there twice"),
        ({"session": {"turns": 0}}, "s.toml: traffic.0.session"),
    ],
)
def test_a_session_that_cannot_be_sent_is_one_sentence(changes, message):
    with pytest.raises(ScenarioError) as error:
        planned({**TALK, **changes})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_turn_is_due_a_pause_after_the_last_answer_that_it_waits_for():
    plan, *searches, answer = by_session(planned(AGENT))[0]
    progress = SessionProgress([plan, *searches, answer])
    assert progress.complete(plan.number, 2.0, "calls") == [(search, 2.5) for search in searches]
    assert progress.complete(searches[0].number, 4.0, "first") == []
    assert progress.complete(searches[2].number, 3.0, "third") == []
    assert progress.complete(searches[1].number, 3.5, "second") == [(answer, 4.0)]
    said = [(m["role"], m["content"]) for m in progress.body(answer)["messages"]]
    assert ("assistant", "calls") in said
    assert [("assistant", "first"), ("user", "second"), ("user", "third")] == said[-4:-1]
    assert progress.keeps_text(plan.number)
    assert not progress.keeps_text(answer.number)


def test_a_session_stays_in_one_process():
    requests = planned(TALK)
    shares = split_requests(requests, 3)
    owners = [{request["session"] for request in share} for share in shares]
    assert sum(map(len, shares)) == len(requests)
    assert len(set.union(*owners)) == sum(map(len, owners))
    assert max(map(len, owners)) - min(map(len, owners)) <= 1
