"""All tiers must pass a text; some are asked only where an earlier one is uncertain."""

import pytest
from scripted_guard import ByHand

from vllm_instant.deployment.errors import DeploymentError
from vllm_instant.deployment.settings import resolve
from vllm_instant.interfaces.guard import Action, GuardRequest, Replacement, Verdict
from vllm_instant_plugins.guard.plugin import TiersOptions, build_tiers
from vllm_instant_plugins.guard.rules import Rules, RuleSet
from vllm_instant_plugins.guard.tiers import Tier, Tiers


def begin(*tiers):
    return Tiers(tiers).begin(GuardRequest(request_id="r", side="answer"))


def rules(action=Action.STOP):
    return Tier("rules", Rules(RuleSet(["bomb"]), action))


def test_the_slowest_tier_decides_how_far_a_text_passes():
    slow = ByHand()
    judge = begin(rules(), Tier("slow", slow))
    assert judge.judge("hello there ", (), False).upto == 0
    slow.of("answer").verdict = Verdict(6)
    assert judge.judge("", (), False).upto == 6


def test_a_stop_of_one_tier_ends_the_text_where_the_others_pass_it():
    slow = ByHand()
    judge = begin(rules(), Tier("slow", slow))
    judge.judge("hello ", (), False)
    slow.of("answer").verdict = Verdict(3)
    verdict = judge.judge("a bomb here", (), False)
    assert (verdict.action, verdict.upto, verdict.tier, verdict.rule) == (Action.STOP, 3, "rules", "bomb")


def test_replacements_wait_for_the_other_tiers():
    slow = ByHand()
    judge = begin(rules(Action.REPLACE), Tier("slow", slow))
    assert judge.judge("a bomb here", (), False).replacements == []
    slow.of("answer").verdict = Verdict(11)
    verdict = judge.judge("", (), False)
    assert (verdict.replacements, verdict.action) == ([Replacement(2, 6, "***")], Action.REPLACE)
    assert judge.judge("", (), False).replacements == []


def test_an_escalated_span_waits_for_the_next_tier():
    model = ByHand()
    judge = begin(rules(Action.ESCALATE), Tier("model", model, is_asked_always=False))
    assert judge.judge("hello ", (), False).upto == 6
    assert model.judges == []
    verdict = judge.judge("a bomb is ", (), False)
    assert (verdict.action, verdict.upto) == (Action.PASS, 8)
    assert model.of("answer").text == "hello a bomb is "
    model.of("answer").verdict = Verdict(16)
    assert judge.judge("here", (), False).upto == 20


def test_the_next_tier_may_stop_what_was_escalated():
    model = ByHand()
    judge = begin(rules(Action.ESCALATE), Tier("model", model, is_asked_always=False))
    judge.judge("a bomb is ", (), False)
    model.of("answer").verdict = Verdict(0, Action.STOP, rule="S1")
    verdict = judge.judge("", (), False)
    assert (verdict.action, verdict.upto, verdict.tier) == (Action.STOP, 2, "model")


def test_an_escalation_of_the_last_tier_is_a_stop():
    verdict = begin(rules(Action.ESCALATE)).judge("fine, a bomb is ", (), False)
    assert (verdict.action, verdict.upto) == (Action.STOP, 8)


def test_text_that_a_tier_suspects_is_not_late_there():
    judge = begin(rules(), Tier("slow", ByHand()))
    assert judge.judge("a bo", (), False).suspect_from == 2


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ('[{plugin = "magic"}]', "must be one of rules, classifier, model"),
        ('[{plugin = "rules", words = ["a"], asked = "never"}]', '"always" or "escalated"'),
        ('[{plugin = "rules", words = ["a"], late = "wait"}]', "belongs into"),
        ('[{plugin = "rules", word = ["a"]}]', "Extra inputs"),
        ('[{plugin = "rules"}]', "there are no rules"),
    ],
)
def test_a_tier_that_is_not_valid_is_a_sentence(tmp_path, tiers, message):
    file = tmp_path / "deploy.toml"
    file.write_text(f'[guard]\nplugin = "tiers"\ntiers = {tiers}\n')
    with pytest.raises(DeploymentError, match=message):
        resolve(file)


def test_tiers_are_built_from_their_tables():
    tables = ({"plugin": "rules", "words": ["bomb"], "name": "words"}, {"plugin": "rules", "words": ["x"]})
    guard = build_tiers(TiersOptions(tiers=tables))
    verdict = guard.begin(GuardRequest(request_id="r", side="answer")).judge("a bomb ", (), True)
    assert (verdict.action, verdict.tier) == (Action.STOP, "words")
    with pytest.raises(ValueError, match="first tier must always be asked"):
        build_tiers(TiersOptions(tiers=({"plugin": "rules", "words": ["x"], "asked": "escalated"},)))
