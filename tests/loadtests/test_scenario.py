from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_instant_loadtests import launcher, schedule
from vllm_instant_loadtests.prompts import BUILT_IN, from_file, of_class
from vllm_instant_loadtests.scenario import ScenarioError, built_in, load, parse

TRAFFIC = {"kind": "a", "prompts": "code", "rate": 2.0}


def scenario(**more):
    return parse({"title": "t", "seconds": 30, "traffic": [TRAFFIC], **more}, Path("s.toml"))


@pytest.mark.parametrize("name", built_in())
def test_every_built_in_scenario_sends_something(name):
    requests = schedule.scheduled_requests(load(name), "0")
    kinds = {request.kind.partition(":")[0] for request in requests}
    assert kinds == {traffic.kind for traffic in load(name).traffic}
    assert [request.at for request in requests] == sorted(request.at for request in requests)
    assert [request.number for request in requests] == list(range(len(requests)))


def test_the_documented_scenarios_exist():
    promised = "assistant steady burst ramp mix draft-collapse long-prompt-intrusion kv-squeeze disconnects typists"
    assert set(built_in()) == {*promised.split(), "conversation", "agent", "planner"}


def test_in_the_draft_collapse_creative_traffic_replaces_structured_at_the_same_rate():
    requests = schedule.scheduled_requests(load("draft-collapse"), "0")
    before = [request.kind for request in requests if request.at < load("draft-collapse").seconds / 2]
    after = [request.kind for request in requests if request.at >= load("draft-collapse").seconds / 2]
    assert set(before) == {"structured"}
    assert set(after) == {"creative"}
    assert len(after) == pytest.approx(len(before), rel=0.2)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"seconds": 0}, "s.toml: seconds = 0: input should be greater than 0"),
        ({"speed": 1}, "s.toml: speed is not a key of a scenario"),
        ({"traffic": []}, "s.toml: traffic = []: list should have at least 1 item"),
        ({"traffic": [{"kind": "a", "prompts": "code"}]}, "the traffic 'a' should have either a rate or a trace"),
        ({"traffic": [{**TRAFFIC, "rate": -1}]}, "the rate of 'a' should be above 0, not -1"),
        ({"traffic": [{**TRAFFIC, "rate": [[5, 1], [2, 1]]}]}, "in order of time"),
        (
            {"traffic": [{**TRAFFIC, "max_tokens": [9, 3]}]},
            "max_tokens of 'a' should be two bounds above 0, not [9, 3]",
        ),
        ({"traffic": [TRAFFIC, TRAFFIC]}, "several kinds of traffic are called 'a'"),
        ({"goals": {"ttft": 3}}, "s.toml: goals.ttft is not a key"),
    ],
)
def test_a_scenario_that_cannot_be_run_is_one_sentence(tables, message):
    with pytest.raises(ScenarioError) as error:
        scenario(**tables)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("traffic", "message"),
    [
        ({**TRAFFIC, "prompts": "poetry"}, "the prompts of 'a' should be a file or one of code"),
        ({"kind": "a", "prompts": "code", "trace": "no.txt"}, "the trace of 'a' cannot be used"),
    ],
)
def test_files_that_are_not_there_are_one_sentence(traffic, message):
    with pytest.raises(ScenarioError, match=message):
        schedule.scheduled_requests(scenario(traffic=[traffic]), "0")


def test_an_unknown_scenario_names_those_that_exist():
    with pytest.raises(
        ScenarioError, match="stedy is neither a file nor a scenario: there are agent, assistant, burst"
    ):
        load("stedy")


def test_rate_and_length_can_be_scaled():
    whole = scenario(traffic=[{**TRAFFIC, "rate": [[0, 2.0], [15, 4.0]]}])
    scaled = whole.scaled(3.0, 60)
    assert scaled.traffic[0].rate == [(0, 6.0), (30, 12.0)]
    assert scaled.seconds == 60
    assert len(schedule.scheduled_requests(scaled, "0")) == pytest.approx(
        6 * len(schedule.scheduled_requests(whole, "0")), rel=0.15
    )


def test_the_seed_decides_prompts_and_arrivals():
    first, again, other = (schedule.scheduled_requests(scenario(), seed) for seed in ("1", "1", "2"))
    assert first == again
    assert {request.body["messages"][0]["content"] for request in first}.isdisjoint(
        request.body["messages"][0]["content"] for request in other[:3]
    )


def test_every_server_gets_every_part_of_the_timeline_alternately():
    segments = schedule.segments(scenario(alternation={"seconds": 10}), ["a", "b"], "0")
    assert len(segments) == 6
    for server in "ab":
        mine = [segment for segment in segments if segment.servers == (server,)]
        assert [(segment.begin, segment.end) for segment in mine] == [(0, 10), (10, 20), (20, 30)]
    assert [segment.number for segment in segments] == [0, 0, 1, 1, 2, 2]


def test_together_means_at_the_same_time():
    segments = schedule.segments(scenario(alternation={"together": True}), ["a", "b"], "0")
    assert [(segment.servers, segment.begin, segment.end) for segment in segments] == [(("a", "b"), 0, 30)]


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_prompts_are_fresh(name):
    texts = [json.dumps([asked.before, asked.text]) for asked in of_class(name, 60, "s")]
    assert len(texts) == 60
    assert len(set(texts)) == 60


def test_requests_to_an_assistant_are_whole_conversations_with_their_temperature():
    found = schedule.scheduled_requests(load("assistant"), "0")
    talks = [due for due in found if due.kind == "conversation"]
    assert {len(due.body["messages"]) for due in talks} == {3, 5}
    assert {due.body["temperature"] for due in talks} == {0.7}
    tools = next(due for due in found if due.kind == "tools")
    roles = [turn["role"] for turn in tools.body["messages"]]
    # Solved examples stand before the question.
    assert roles == ["system", *["user", "assistant"] * (len(roles) // 2 - 1), "user"]
    assert len(roles) > 2
    assert not any("ignore_eos" in due.body for due in found)


def test_long_prompts_have_the_length_that_is_asked_for():
    assert {len(asked.text) for asked in of_class("long", 4, "s", 900)} == {900}


def test_prompts_from_files(tmp_path):
    lines = [
        {"prompt": "one", "temperature": 0.7},
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}]},
        {
            "conversations": [
                {"from": "human", "value": "hello"},
                {"from": "gpt", "value": "hi"},
                {"from": "human", "value": "three"},
                {"from": "gpt", "value": "is not asked"},
            ]
        },
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    asked = from_file(file)
    assert [one.text for one in asked] == ["one", "two", "three"]
    assert asked[0].temperature == 0.7
    assert [turn["content"] for turn in asked[2].before] == ["hello", "hi"]
    whole = tmp_path / "prompts.json"
    whole.write_text(json.dumps(lines))
    assert from_file(whole) == asked
    plain = tmp_path / "prompts.txt"
    plain.write_text("first\n\nsecond\n")
    assert [one.text for one in from_file(plain)] == ["first", "second"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "has no prompts"), ("{", "neither a JSON list"), ('{"text": 1}', "object 1 should have a prompt")],
)
def test_files_without_prompts_are_one_sentence(tmp_path, text, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        from_file(file)


def test_all_of_a_users_prompts_are_sent_before_any_is_repeated(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(40)))
    found = parse({"title": "t", "seconds": 20, "traffic": [{**TRAFFIC, "prompts": "p.txt"}]}, tmp_path / "s.toml")
    asked = [request.body["messages"][0]["content"] for request in schedule.scheduled_requests(found, "0")]
    assert len(set(asked[:40])) == min(40, len(asked))


def test_locust_settings_of_the_environment_do_not_reach_the_run(tmp_path, monkeypatch):
    """CI jobs and Kubernetes services leave LOCUST_* variables that would shorten or redirect a run."""
    given = {}

    def start(command, *, output, environment):
        given.update(environment)
        raise OSError("not started")

    monkeypatch.setenv("LOCUST_RUN_TIME", "1s")
    monkeypatch.setenv("LOCUST_MASTER_PORT", "tcp://10.0.0.1:5557")
    monkeypatch.setenv("KEPT", "yes")
    monkeypatch.setattr(launcher, "start_guarded", start)
    with pytest.raises(OSError, match="not started"):
        launcher.run_locust(launcher.LocustCommand("steady", {}, {}, tmp_path / "run"), "command")
    assert given["KEPT"] == "yes"
    assert not [name for name in given if name.startswith("LOCUST_")]
