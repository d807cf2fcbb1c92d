"""The check of a guard finds leaks and mistakes where there are some, and none where there are none."""

import asyncio
import json

import pytest
from scripted_guard import ByHand, rules, service
from typer.testing import CliRunner

from vllm_instant.interfaces.guard import Action, Guard, GuardOptions, TextJudge, Verdict
from vllm_instant.tools.cli import app
from vllm_instant.tools.demo.assets import ASSETS
from vllm_instant.tools.measure.guard_check import FalseStops, GuardCheck, passages

TOKENIZER = ASSETS / "base"


class Careless(Guard):
    """Sees a violation a few characters too late."""

    def begin(self, request):
        class Judge(TextJudge):
            text = ""

            def judge(self, text, token_ids, is_finished):
                self.text += text
                found = self.text.find("bomb")
                if found >= 0 and len(self.text) > found + 4:
                    return Verdict(len(self.text), Action.STOP)
                return Verdict(len(self.text))

        return Judge()


def test_rules_leak_nothing_on_any_path():
    report = asyncio.run(GuardCheck(rules(), TOKENIZER, ["bomb", "secret plan"]).leaks(200))
    assert (report.count, report.leaked, report.max_leak, report.missed) == (200, 0, 0, 0)
    assert len(report.by_path) == 10
    assert report.stopped >= 180


def test_a_guard_that_is_too_late_is_found_out():
    report = asyncio.run(GuardCheck(service(Careless()), TOKENIZER, ["bomb"]).leaks(60))
    assert report.leaked > 20
    assert report.max_leak > 0


def test_replaced_violations_are_no_leaks():
    report = asyncio.run(GuardCheck(rules(action="replace"), TOKENIZER, ["bomb"]).leaks(60))
    assert (report.leaked, report.missed) == (0, 0)


def test_a_guard_that_says_nothing_leaks_its_window_at_most():
    options = GuardOptions(late="release", hold_tokens=4, hold_ms=1, max_wait_seconds=0.05, side="answer")
    report = asyncio.run(GuardCheck(service(ByHand(), options), TOKENIZER, ["bomb"]).leaks(60))
    assert report.leaked == 0
    assert report.max_leak <= 4


def test_false_stops_are_counted_with_an_interval():
    judging = rules(words=("import",))
    found = asyncio.run(GuardCheck(judging, TOKENIZER, ["import"]).false_stops(300))
    assert found.count == 300
    assert found.stopped > 0
    low, high = found.interval()
    assert low < found.stopped / 300 < high
    assert FalseStops(100, 0).interval() == (0.0, pytest.approx(1 - 0.025 ** (1 / 100)))


def test_passages_do_not_run_out():
    assert sum(1 for _ in passages(50)) == 50


def test_the_command_reports_and_fails_on_what_was_missed(tmp_path):
    file, report = tmp_path / "deploy.toml", tmp_path / "report.json"
    file.write_text('[guard]\nplugin = "rules"\nwords = ["bomb"]\n')
    words = ["verify", "--guard", str(file), "--planted", "40", "--clean", "40", "--json", str(report)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(report.read_text())["leaks"]["leaked"] == 0
    violations = tmp_path / "violations.txt"
    violations.write_text("something else\n")
    result = CliRunner().invoke(app, [*words, "--violations", str(violations)])
    assert result.exit_code == 1


def test_passages_with_a_violation_are_no_false_stops():
    check = GuardCheck(rules(words=("import",)), TOKENIZER, ["import"], lambda text: "import" not in text.casefold())
    found = asyncio.run(check.false_stops(300))
    assert 0 < found.count < 300
    assert found.stopped == 0
