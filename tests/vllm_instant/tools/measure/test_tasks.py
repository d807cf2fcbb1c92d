"""Judged tasks: what counts as right, paired intervals, and the same requests for both servers."""

import json
import random

import pytest
from fake_server import FakeServer, serving

from vllm_instant.tools.demo import prompt_sets
from vllm_instant.tools.measure import tasks
from vllm_instant.tools.measure.sampling import ServerClient
from vllm_instant.tools.measure.tasks import KEYS, RIGHT, VALID

pytestmark = pytest.mark.unit
MEETING = next(prompt_sets.meetings(random.Random(0)))
FACTS = dict(MEETING.facts)


@pytest.mark.parametrize(
    ("answer", "marks"),
    [
        (json.dumps(FACTS), (True, True, True)),
        (f"Here it is:\n```json\n{json.dumps(FACTS, indent=2)}\n```", (True, True, True)),
        (json.dumps(FACTS | {"who": [FACTS["who"], "Bo"]}), (True, True, True)),
        (json.dumps(FACTS | {"where": "elsewhere"}), (True, True, False)),
        (json.dumps({"what": FACTS["what"]}), (True, False, False)),
        (json.dumps(FACTS)[:-1], (False, False, False)),
        ("none", (False, False, False)),
        ("{}", (True, False, False)),
    ],
)
def test_marks_of_facts(answer, marks):
    found = tasks._facts(answer, MEETING)
    assert (found[VALID], found[KEYS], found[RIGHT]) == marks


@pytest.mark.parametrize(
    ("answer", "marks"),
    [
        (
            '{"name": "convert_money", "arguments": {"amount": "25", "source": "eur", "target": "USD"}}',
            (True, True, True),
        ),
        (
            '{"name": "convert_money", "arguments": {"amount": 26, "source": "EUR", "target": "USD"}}',
            (True, True, False),
        ),
        ('{"name": "get_weather", "arguments": {"amount": 25, "source": "EUR", "target": "USD"}}', (True, True, False)),
        ('{"name": "convert_money", "arguments": [25]}', (True, True, False)),
        ('{"name": "convert_money"}', (True, False, False)),
        ("25 EUR", (False, False, False)),
    ],
)
def test_marks_of_tool_calls(answer, marks):
    wanted = prompt_sets.ToolRequest("", "convert_money", {"amount": 25, "source": "EUR", "target": "USD"})
    found = tasks._call(answer, wanted)
    assert (found[VALID], found[KEYS], found[RIGHT]) == marks


def test_an_interval_keeps_its_width_where_no_pair_differs():
    """Exactly: of 164 equal pairs, a rate of differing pairs up to 1.8 % is plausible (rule of three)."""
    found = tasks.paired_difference([(True, True)] * 14 + [(False, False)] * 150)
    assert found.mean == 0
    assert 0.01 < found.high == -found.low < 0.02


def test_the_interval_covers_the_truth_as_often_as_it_says():
    choose = random.Random(0)
    covered = 0
    for _ in range(2000):
        pairs = [(choose.random() < 0.55, choose.random() < 0.5) for _ in range(60)]
        found = tasks.paired_difference(pairs)
        covered += found.low <= 0.05 <= found.high
    assert 0.93 < covered / 2000 < 0.98


def test_both_servers_get_the_same_requests_and_are_compared_in_pairs():
    asked = tasks.tasks(count=6, problems=0)
    right = {prompt_sets.extraction_request(m): json.dumps(dict(m.facts)) for m in _meetings(6)}
    good = FakeServer(text_of=lambda body: right.get(body["messages"][-1]["content"], "x"))
    bad = FakeServer({9: 1.0}, text_of=lambda body: "x")
    with serving(good) as good_url, serving(bad) as bad_url:
        answers = [[tasks.ask(ServerClient(url, "fake"), task, 0.0) for task in asked] for url in (bad_url, good_url)]
    assert _sorted(good.requests) == _sorted(bad.requests)
    assert not any(request["ignore_eos"] for request in good.requests)
    report = tasks.report(asked, *answers, 0.0)
    [facts] = [row for row in report.marks if (row.task, row.mark) == ("facts", RIGHT)]
    assert (facts.answers, facts.baseline, facts.ours, facts.difference.mean) == (6, 1.0, 0.0, -1.0)
    assert {row.task: row.equal.mean for row in report.equality} == {"facts": 0.0, "tools": 0.0, "text": 0.0}
    assert json.loads(json.dumps(report.plain()))["marks"]


def test_sampled_answers_are_not_compared_token_by_token():
    asked = tasks.tasks(count=3, problems=0)
    with serving(FakeServer()) as url:
        answers = [tasks.ask(ServerClient(url, "fake"), task, 0.7) for task in asked]
    assert tasks.report(asked, answers, answers, 0.7).equality == []
    [first, *_] = tasks.report(asked, answers, answers, 0.0).equality
    assert (first.equal.mean, first.shared_prefix) == (1.0, 1.0)


def test_human_eval_continues_the_models_own_code_block_and_is_judged_by_its_tests(monkeypatch):
    problems = [{"prompt": "def f():\n", "test": "", "entry_point": "f"}] * 2
    monkeypatch.setattr(prompt_sets, "human_eval_problems", lambda: problems)
    judged = []
    monkeypatch.setattr(tasks.human_eval, "results", lambda _, given: judged.extend(given) or ["passed", "timed out"])
    fake = FakeServer(text_of=lambda body: "    return 1\nprint(f())\n")
    with serving(fake) as url:
        answers = tasks.ask(ServerClient(url, "fake"), tasks.tasks(count=3, problems=2)[-1], 0.0)
    assert [answer.marks[tasks.PASSED] for answer in answers] == [True, False]
    last = {request["messages"][-1]["content"] for request in fake.requests}
    assert last == {"```python\ndef f():"}
    assert all(request["continue_final_message"] and len(request["stop"]) == 4 for request in fake.requests)
    assert judged == ["    return 1"] * 2  # the fifth stop word is cut here


def _meetings(count):
    return [made for _, made in zip(range(count), prompt_sets.meetings(random.Random("tasks/0")), strict=False)]


def _sorted(requests):
    return sorted(json.dumps(request, sort_keys=True) for request in requests)
