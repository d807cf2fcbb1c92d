"""``vllm-instant escalation`` from its words to its exit code."""

import json
import random

import pytest
from typer.testing import CliRunner

from vllm_instant.escalation.learned_rule import read_rule
from vllm_instant.tools.cli import app
from vllm_instant.tools.cli import escalation as command
from vllm_instant.tools.escalation import report

RUN = CliRunner()


@pytest.fixture(scope="module", autouse=True)
def _few_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "DRAWS", 200)
        yield


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    dice = random.Random(0)
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    lines = []
    for number in range(100):
        word = "prove" if number % 2 else "chat"
        prompt = f"{word} {' '.join(dice.choices(['river', 'stone', 'cloud'], k=dice.randrange(1, 9)))} {number}"
        deep = "right" if number % 2 else "wrong"
        lines.append({"prompt": prompt, "fast": "wrong", "deep": deep, "reference": "right"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_rule_is_learned_shown_written_and_judged_again(answers, tmp_path):
    rule, numbers = tmp_path / "rule.json", tmp_path / "report.json"
    words = ["--score", "exact", "--max-loss", "0.05"]
    result = RUN.invoke(app, ["escalation", "learn", str(answers), str(rule), *words, "--json", str(numbers)])
    assert result.exit_code == 0, result.output
    assert "100 prompts, the deep answer is better for 50; cost: share of deep answers" in result.output
    assert "Recommended." in result.output
    assert f'rule_file = "{rule}"' in result.output
    learned = read_rule(rule)
    assert learned.threshold == json.loads(numbers.read_text())["threshold"] == learned.learned_from["threshold"]
    assert learned.probability({"prompt": "prove it"}) > 0.5 > learned.probability({"prompt": "chat"})
    again = RUN.invoke(app, ["escalation", "report", str(answers), "--rule", str(rule), *words])
    assert again.exit_code == 0, again.output


def test_a_rule_that_does_not_beat_its_baselines_is_not_written(answers, tmp_path):
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    dice = random.Random(1)
    shuffled = tmp_path / "shuffled.jsonl"
    deep = [line["deep"] for line in lines]
    dice.shuffle(deep)
    shuffled.write_text("".join(json.dumps({**a, "deep": b}) + "\n" for a, b in zip(lines, deep, strict=True)))
    rule = tmp_path / "rule.json"
    result = RUN.invoke(app, ["escalation", "learn", str(shuffled), str(rule), "--score", "exact"])
    assert result.exit_code == 1
    assert "Not recommended: " in result.output
    assert not rule.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "none.jsonl"], "cannot be read"),
        (["report", "ANSWERS"], "has no 'fast_score'"),
        (["report", "ANSWERS", "--score", "judge"], "--score judge needs --judge-url and --judge-model"),
        (["report", "ANSWERS", "--score", "exact", "--rule", "none.json"], "none.json cannot be read"),
        (["ask", "ANSWERS", "out", "--fast", "http://127.0.0.1:9", "--deep", "http://127.0.0.1:9"], "is no running"),
    ],
)
def test_mistakes_get_one_sentence(answers, words, message):
    result = RUN.invoke(app, ["escalation", *(str(answers) if word == "ANSWERS" else word for word in words)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_scikit_learn_the_command_names_the_extra(answers, monkeypatch):
    def require(name, modules, *, extra):
        raise SystemExit(f"{name} {modules} {extra}")

    monkeypatch.setattr(command, "require", require)
    result = RUN.invoke(app, ["escalation", "report", str(answers)])
    assert str(result.exception) == "escalation {'sklearn': 'scikit-learn'} escalation"
