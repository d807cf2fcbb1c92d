"""Requests as plain JSON, features, and learned rules."""

import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_instant.escalation.conversations import DeepConversations
from vllm_instant.escalation.features import FORM, MAX_CHARACTERS, features_of
from vllm_instant.escalation.learned_rule import LearnedRule, read_rule
from vllm_instant.escalation.requests import client_choice, prompt_text, with_settings


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "one"}, "one"),
        ({"prompt": ["one", "two"]}, "one\ntwo"),
        ({"prompt": [1, 2, 3]}, ""),
        ({"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "one"}]}, "be\none"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}, "a"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, ""),
        ({"messages": "broken"}, "broken"),
        ({}, ""),
    ],
)
def test_the_text_of_prompts(body, text):
    assert prompt_text(body) == text


def test_features_have_names_and_a_bounded_cost():
    body = {"messages": [{"role": "user", "content": "What is 2 + 2? Über\n```x```"}], "tools": [1], "max_tokens": 9}
    features = dict(zip(FORM, features_of(body, {}), strict=True))
    assert features["characters"] == pytest.approx(np.log1p(27))
    assert features["questions"] == pytest.approx(np.log1p(1))
    assert features["code"] == pytest.approx(np.log1p(2))
    assert (features["tools"], features["schema"]) == (1, 0)
    assert features["max_tokens"] == pytest.approx(np.log1p(9))
    assert features_of({"prompt": "the cat and a dog"}, {"dog": 1, "bird": 0})[len(FORM) :].tolist() == [0, 1]
    long = features_of({"prompt": "a " * 10 * MAX_CHARACTERS + "needle"}, {"needle": 0})
    assert long[0] == pytest.approx(np.log1p(20 * MAX_CHARACTERS + 6))
    assert long[-1] == 1
    assert np.isfinite(features_of({}, {})).all()


def _rule(**changes):
    count = len(FORM) + 1
    return {
        "vocabulary": ["prove"],
        "mean": [0.0] * count,
        "scale": [1.0] * count,
        "coefficients": [0.0] * (count - 1) + [2.0],
        "intercept": -1.0,
        "slope": -1.0,
        "offset": 0.0,
        "threshold": 0.5,
        **changes,
    }


def test_a_learned_rule_is_its_formula():
    rule = LearnedRule.model_validate(_rule())
    assert rule.probability({"prompt": "prove it"}) == pytest.approx(1 / (1 + np.exp(-1)))
    assert rule.probability({"prompt": "hello"}) == pytest.approx(1 / (1 + np.exp(1)))
    assert LearnedRule.model_validate(_rule(slope=-1e9)).probability({"prompt": "prove"}) == pytest.approx(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no learned rule"),
        ("{}", "is no learned rule: .*: Field required"),
        (json.dumps(_rule(mean=[0.0])), "must have 15 numbers each"),
        (json.dumps(_rule(form=["characters"])), "numbers each|learn it again"),
        (json.dumps(_rule(threshold=2)), "is no learned rule: threshold"),
    ],
)
def test_what_is_no_learned_rule(tmp_path, content, message):
    path = tmp_path / "rule.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rule(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_rule(tmp_path / "none.json")


KEYS = ("messages", "prompt", "content", "role", "text", "vllm_xargs", "instant_escalation", "max_tokens", "tools")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["user", "deep", "x", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5))
def test_no_request_of_a_client_raises(body):
    before = json.dumps(body)
    assert isinstance(prompt_text(body), str)
    with suppress(ValueError):
        client_choice(body, is_allowed=True)
    changed = with_settings(body, {"vllm_xargs": {"a": 1}, "max_tokens": 3})
    assert "instant_escalation" not in (changed["vllm_xargs"] if isinstance(changed["vllm_xargs"], dict) else {})
    assert np.isfinite(features_of(body, {})).all()
    conversations = DeepConversations()
    conversations.remember("t", body)
    conversations.is_deep("t", body)
    assert json.dumps(body) == before


def test_deep_nesting_is_the_api_servers_to_refuse():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert prompt_text({"prompt": nested}) == ""


def test_old_conversations_are_forgotten():
    conversations = DeepConversations(max_conversations=2)
    chats = [{"messages": [{"role": "user", "content": str(number)}]} for number in range(3)]
    for chat in chats:
        conversations.remember("", chat)
    again = [{"messages": [*chat["messages"], {"role": "user", "content": "more"}]} for chat in chats]
    assert [conversations.is_deep("", chat) for chat in again] == [False, True, True]
