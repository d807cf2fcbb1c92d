"""What a plugin may return, and what happens where it returns something else."""

import pytest
from scripted_guard import ByHand, service

from vllm_instant.guard.judgment import SLICE
from vllm_instant.interfaces.guard import Action, Replacement, Verdict


def begun(verdict=None):
    by_hand = ByHand()
    judging = service(by_hand)
    judgment = judging.begin("answer", "r", {"a": 1}, lambda: None)
    judgment.add("0123456789")
    if verdict is not None:
        by_hand.of("answer").verdict = verdict
    return judgment, by_hand.of("answer"), judging


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict(11),
        Verdict(-1),
        Verdict(5, suspect_from=4),
        Verdict(5, Action.REPLACE, replacements=[Replacement(3, 6, "")]),
        Verdict(5, Action.REPLACE, replacements=[Replacement(3, 3, "")]),
        Verdict(5, Action.REPLACE, replacements=[Replacement(3, 4, ""), Replacement(2, 3, "")]),
        Verdict(5, "explode"),
        Verdict("much"),
        (5, "pass"),
        None,
    ],
)
def test_a_verdict_that_is_not_allowed_fails_the_plugin(verdict):
    judgment, judge, judging = begun()
    judge.verdict = verdict
    judgment.step()
    assert judgment.has_failed
    assert judgment.verdict == Verdict(0)
    assert judging.guarded.failures == {"judge": 1}


def test_a_verdict_that_goes_back_fails_the_plugin():
    judgment, judge, _ = begun(Verdict(5))
    judgment.step()
    judge.verdict = Verdict(4)
    judgment.step()
    assert judgment.has_failed
    assert judgment.verdict.upto == 5


def test_a_long_text_is_judged_in_slices():
    judgment, judge, _ = begun()
    judgment.add("x" * (2 * SLICE + 5), (), is_finished=True)
    steps = 1
    while judgment.step():
        steps += 1
    assert steps == 4
    assert len(judge.text) == 2 * SLICE + 15
    judge.verdict = Verdict(len(judge.text))
    assert not judgment.has_passed
    judgment.step()
    assert judgment.has_passed


def test_nothing_is_asked_behind_a_stop():
    judgment, judge, _ = begun(Verdict(3, Action.STOP))
    judgment.step()
    judgment.add("more")
    judgment.step()
    assert judge.text == "0123456789"
    assert judgment.is_stopped


def test_the_plugin_is_told_what_it_may_know():
    _, judge, _ = begun()
    assert (judge.request.request_id, judge.request.side, judge.request.extra_args) == ("r", "answer", {"a": 1})


def test_the_metrics_count_what_happens():
    judging = service(ByHand())
    judging.begin("prompt", "r", {}, lambda: None)
    judging.record("stop", "r", "prompt", Verdict(3, Action.STOP, rule="late"), "")
    judging.metrics.released(0.2, 3)
    registry = judging.metrics._delay  # one sample of the histogram
    assert registry._sum.get() == pytest.approx(0.2)
    assert judging.metrics._unjudged._value.get() == 3
    assert judging.metrics._stopped.labels("tested", "late", "prompt")._value.get() == 1
