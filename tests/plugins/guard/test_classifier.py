"""A classifier in a process of its own: scores in order, and what happens when the process dies or hangs."""

import asyncio
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from scripted_guard import service

from vllm_instant.interfaces.guard import Action, GuardOptions, GuardRequest
from vllm_instant.patches.guard_replay import ForcedAnswer, ForcedEngine
from vllm_instant.tools.demo.assets import ASSETS
from vllm_instant_plugins.guard import classifier_worker
from vllm_instant_plugins.guard.classifier import ClassifierGuard
from vllm_instant_plugins.guard.classifier_process import MAX_RESTARTS, ClassifierProcess

FAKE = Path(__file__).parents[2] / "support" / "fake_classifier.py"


def process(*words, max_seconds=10.0):
    return ClassifierProcess({"model": "fake"}, max_seconds, [sys.executable, str(FAKE), *words])


@pytest.fixture(scope="module")
def running():
    found = process()
    found.wait_until_ready(30)
    yield found
    found.close()


class Text:
    """One text under a classifier, whose test waits for verdicts."""

    def __init__(self, guard):
        self._woken = threading.Event()
        self.judge = guard.begin(GuardRequest(request_id="r", side="answer", wake=self._woken.set))

    def add(self, text, is_finished=False):
        return self.judge.judge(text, (), is_finished)

    def verdict(self):
        assert self._woken.wait(20)
        self._woken.clear()
        return self.judge.judge("", (), False)


def test_a_text_passes_when_it_was_scored(running):
    text = Text(ClassifierGuard(running, 0.5, None, 100))
    assert text.add("harmless").upto == 0
    assert text.verdict().upto == 8
    assert text.add("").upto == 8


def test_what_comes_meanwhile_is_scored_next(running):
    text = Text(ClassifierGuard(running, 0.5, None, 100))
    text.add("one ")
    text.add("two ")
    assert text.verdict().upto in (4, 8)
    assert text.verdict().upto == 8


def test_an_unsafe_text_stops_where_the_safe_part_ends(running):
    text = Text(ClassifierGuard(running, 0.5, None, 100))
    text.add("fine ")
    assert text.verdict().upto == 5
    text.add("un")
    assert text.verdict().upto == 7
    text.add("safe words")
    verdict = text.verdict()
    assert (verdict.action, verdict.upto, verdict.rule) == (Action.STOP, 7, "unsafe")
    assert text.add("more").action is Action.STOP


def test_an_uncertain_text_escalates(running):
    text = Text(ClassifierGuard(running, 0.5, 0.3, 100))
    text.add("an odd text")
    verdict = text.verdict()
    assert (verdict.action, verdict.start, verdict.upto) == (Action.ESCALATE, 0, 11)


def test_only_the_newest_text_is_scored_but_all_of_what_is_new(running):
    text = Text(ClassifierGuard(running, 0.5, None, 10))
    text.add("unsafe" + "x" * 50)
    assert text.verdict().action is Action.STOP
    text = Text(ClassifierGuard(running, 0.5, None, 10))
    text.add("a" * 30)
    text.verdict()
    text.add("b" * 5)
    assert text.judge._recent == "a" * 5 + "b" * 5


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_process_that_dies_or_hangs_is_started_again_and_loses_no_text(tmp_path, fault):
    tested = process(str(tmp_path / "died"), max_seconds=0.3)
    tested.wait_until_ready(30)
    try:
        first = tested.pid
        text = Text(ClassifierGuard(tested, 0.5, None, 100))
        text.add(f"{fault} once")
        assert text.verdict().upto == len(fault) + 5
        assert tested.pid != first
        assert tested.num_restarts == 1
    finally:
        tested.close()


def test_a_process_that_is_stopped_is_replaced(running):
    tested = process(max_seconds=0.3)
    tested.wait_until_ready(30)
    try:
        os.kill(tested.pid, signal.SIGSTOP)
        text = Text(ClassifierGuard(tested, 0.5, None, 100))
        text.add("harmless")
        assert text.verdict().upto == 8
    finally:
        tested.close()


def test_a_process_that_dies_again_and_again_fails_the_plugin():
    tested = process()
    tested.wait_until_ready(30)
    judging = service(ClassifierGuard(tested, 0.5, None, 100))
    woken = threading.Event()
    judgment = judging.begin("answer", "r", {}, woken.set)
    judgment.add("it always dies")
    judgment.step()
    assert woken.wait(60)
    assert tested.num_restarts == MAX_RESTARTS
    judgment.step()
    assert judgment.has_failed
    assert judging.guarded.failures == {"judge": 1}
    tested.close()


def test_a_classifier_that_does_not_start_is_a_sentence():
    with pytest.raises(ValueError, match="the classifier 'fake' does not start"):
        process("refuse").wait_until_ready(30)


def test_the_worker_answers_in_batches_and_ends_with_its_input():
    lines = "".join(json.dumps({"id": number, "text": "x" * number}) + "\n" for number in range(70))
    sizes, answers = [], io.StringIO()

    def classify(texts):
        sizes.append(len(texts))
        time.sleep(0.001)
        return [float(len(text)) for text in texts]

    classifier_worker.serve(classify, io.StringIO(lines), answers)
    found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert found == [{"id": number, "score": float(number)} for number in range(70)]
    assert max(sizes) <= classifier_worker.MAX_BATCH


def test_answers_wait_for_their_scores(running):
    judging = service(ClassifierGuard(running, 0.5, None, 100), GuardOptions(side="answer"))
    tested = ForcedEngine(ASSETS / "base", judging)

    def replay(text):
        answer = ForcedAnswer(token_ids=tested.tokenizer.encode(text), step_seconds=0.002)
        return asyncio.run(tested.replay(answer))

    found = replay("a harmless answer")
    assert (found.text, found.finish_reason) == ("a harmless answer", "length")
    found = replay("first something unsafe then")
    assert found.finish_reason == "content_filter"
    assert "unsafe" not in found.text


@pytest.mark.parametrize(("late", "reason"), [("release", "length"), ("stop", "content_filter")])
def test_while_a_process_hangs_late_decides(tmp_path, late, reason):
    tested = process(str(tmp_path / "hung"), max_seconds=30)
    tested.wait_until_ready(30)
    try:
        options = GuardOptions(side="answer", late=late, hold_ms=20)
        judging = service(ClassifierGuard(tested, 0.5, None, 100), options)
        engine = ForcedEngine(ASSETS / "base", judging)
        answer = ForcedAnswer(token_ids=engine.tokenizer.encode("please hang"), kind="FINAL_ONLY")
        began = time.monotonic()
        found = asyncio.run(engine.replay(answer))
        assert found.finish_reason == reason
        assert ("hang" in found.text) is (late == "release")
        assert time.monotonic() - began < 25  # not the 30 s until the process is replaced
        assert not judging.guarded.disabled
    finally:
        tested.close()
