"""The escalation plugins without a server."""

import math

import pytest

from vllm_instant.deployment.errors import DeploymentError
from vllm_instant.deployment.settings import resolve
from vllm_instant.escalation.features import FORM
from vllm_instant.escalation.learned_rule import LearnedRule
from vllm_instant.interfaces.escalation import Decision, Depth, EscalationRequest, Question
from vllm_instant_plugins.escalation.label import Label
from vllm_instant_plugins.escalation.plugin import LearnedOptions, RulesOptions, build_learned, build_rules


def _request(prompt="Hello", body=None, **headers):
    return EscalationRequest(
        request_id="r", path="/v1/completions", body={"prompt": prompt, **(body or {})}, prompt=prompt, headers=headers
    )


def _decided(rules, request, **options):
    return build_rules(RulesOptions(rules=rules, **options)).decide(request, None)


@pytest.mark.parametrize(
    ("rule", "fits", "fits_not"),
    [
        ({"pattern": r"\bprove\b"}, _request("Prove it"), _request("improve it")),
        ({"min_characters": 6}, _request("Hello!"), _request("Hello")),
        ({"max_characters": 5}, _request("Hello"), _request("Hello!")),
        (
            {"headers": {"X-Tenant": "gold|silver"}},
            _request(**{"x-tenant": "gold"}),
            _request(**{"x-tenant": "golden"}),
        ),
        ({"users": ["ann"]}, _request(body={"user": "ann"}), _request()),
        ({"tools": True}, _request(body={"tools": [1]}), _request()),
        ({"tools": False}, _request(), _request(body={"tools": [1]})),
        ({"pattern": "hello", "tools": True}, _request(body={"tools": [1]}), _request()),
    ],
)
def test_a_rule_applies_where_all_its_conditions_do(rule, fits, fits_not):
    assert _decided([rule], fits) == Decision(Depth.DEEP, "rule: rule 1")
    assert _decided([rule], fits_not) == Decision(Depth.FAST, "no rule applies")


def test_the_first_rule_that_applies_decides():
    rules = [{"name": "greetings", "pattern": "hello", "depth": "fast"}, {"min_characters": 1}]
    assert _decided(rules, _request("Hello")) == Decision(Depth.FAST, "rule: greetings")
    assert _decided(rules, _request("Bye")).depth is Depth.DEEP
    assert _decided(rules, _request(""), otherwise="deep") == Decision(Depth.DEEP, "no rule applies")


def _label(threshold=0.5):
    return Label("Hard?", "yes", "no", threshold, 3.0)


def test_the_label_asks_behind_the_same_prompt():
    chat = {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}],
        "tools": [1],
        "temperature": 0.7,
        "n": 3,
        "chat_template_kwargs": {"enable_thinking": True, "a": 1},
        "cache_salt": "x",
    }
    request = EscalationRequest(request_id="r", path="/v1/chat/completions", body=chat, prompt="s\nWhy?")
    question = _label().decide(request, None)
    assert question == Question(
        {
            "model": "m",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?\n\nHard?"}],
            "tools": [1],
            "tool_choice": "none",
            "chat_template_kwargs": {"enable_thinking": False, "a": 1},
            "cache_salt": "x",
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        },
        3.0,
    )
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}
    request = EscalationRequest(request_id="r", path="/v1/chat/completions", body=parts, prompt="Why?")
    assert _label().decide(request, None).body["messages"][0]["content"][1]["text"] == "Hard?"
    parts["messages"].append({"role": "tool", "content": "42"})
    assert _label().decide(request, None).body["messages"][-1] == {"role": "user", "content": "Hard?"}
    assert parts["messages"][-1] == {"role": "tool", "content": "42"}
    assert _label().decide(_request("Why?"), None).body["prompt"] == "Why?\n\nHard?\nAnswer:"
    no_text = EscalationRequest(request_id="r", path="/v1/completions", body={"prompt": [1, 2]}, prompt="")
    assert _label().decide(no_text, None) == Decision(Depth.FAST, "label: no text")


CHAT_ANSWER = {
    "choices": [
        {
            "logprobs": {
                "content": [
                    {
                        "top_logprobs": [
                            {"token": "Yes", "logprob": math.log(0.3)},
                            {"token": " y", "logprob": math.log(0.1)},
                            {"token": "NO", "logprob": math.log(0.1)},
                            {"token": "", "logprob": math.log(0.2)},
                            {"token": "Maybe", "logprob": math.log(0.3)},
                        ]
                    }
                ]
            }
        }
    ]
}
COMPLETION_ANSWER = {
    "choices": [{"logprobs": {"top_logprobs": [{" yes": math.log(0.4), " no": math.log(0.1), " It": math.log(0.5)}]}}]
}


@pytest.mark.parametrize("answer", [CHAT_ANSWER, COMPLETION_ANSWER], ids=["chat", "completion"])
def test_the_label_reads_the_probability_among_both_answers(answer):
    for threshold, depth in ((0.79, Depth.DEEP), (0.81, Depth.FAST)):
        decision = _label(threshold).decide(_request(), answer)
        assert (decision.depth, decision.reason) == (depth, "label")
        assert decision.probability == pytest.approx(0.8)


@pytest.mark.parametrize(
    "answer", [{}, {"choices": []}, {"choices": [{"logprobs": None}]}, {"choices": [{"logprobs": {"content": []}}]}]
)
def test_without_an_answer_the_label_stays_fast(answer):
    assert _label().decide(_request(), answer) == Decision(Depth.FAST, "label: no answer")


def _resolve(tmp_path, text):
    path = tmp_path / "deploy.toml"
    path.write_text(text)
    return resolve(path)


RULES = '[escalation]\nplugin = "rules"\nrules = [{ min_characters = 9 }]\n'


def test_a_deployment_with_an_escalation(tmp_path):
    text = f'{RULES}deep_url = "https://deep"\n[escalation.deep_settings]\nthinking_token_budget = 100\n'
    choice = _resolve(tmp_path, text).slots["escalation"]
    assert choice.options["deep_settings"] == {"thinking_token_budget": 100}
    assert resolve().slots["escalation"].plugin == "off"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RULES, "both ends are the same"),
        (RULES + 'deep_url = "deep:8000"', "http"),
        (RULES.replace("9", '"x"') + 'deep_url = "http://d"', "rule 1: min_characters"),
        (RULES.replace("min_characters = 9", "pattern = '('") + 'deep_url = "http://d"', "RE2 cannot compile"),
        (RULES + 'deep_url = "http://d"\n[guard]\nplugin = "rules"\nwords = ["x"]', "do not pass this server's"),
        (RULES + 'deep_url = "http://d"\nescalate_stopped = true', "escalate_stopped is about"),
        ('[escalation]\nplugin = "learned"\ndeep_url = "http://d"', "rule_file"),
        (
            '[escalation]\nplugin = "learned"\ndeep_url = "http://d"\nrule_file = "none.json"',
            "none.json cannot be read",
        ),
    ],
)
def test_mistakes_are_reported_before_a_model_is_loaded(tmp_path, text, message):
    with pytest.raises(DeploymentError, match=message):
        _resolve(tmp_path, text)


def test_a_guarded_deep_server_is_allowed(tmp_path):
    text = RULES + 'deep_url = "http://d"\ndeep_is_guarded = true\n[guard]\nplugin = "rules"\nwords = ["x"]'
    assert _resolve(tmp_path, text).slots["escalation"].options["deep_is_guarded"]


def test_a_learned_rule_decides_by_its_probability(tmp_path):
    count = len(FORM) + 1
    rule = LearnedRule(
        vocabulary=("prove",),
        mean=(0.0,) * count,
        scale=(1.0,) * count,
        coefficients=(*(0.0,) * (count - 1), 2.0),
        intercept=-1.0,
        slope=-1.0,
        offset=0.0,
        threshold=0.5,
    )
    path = tmp_path / "rule.json"
    path.write_text(rule.model_dump_json())
    plugin = build_learned(LearnedOptions(rule_file=str(path)))
    deep = plugin.decide(_request("prove it"), None)
    assert (deep.depth, deep.reason, deep.probability) == (Depth.DEEP, "learned", pytest.approx(1 / (1 + math.exp(-1))))
    assert plugin.decide(_request("hello"), None).depth is Depth.FAST
    strict = build_learned(LearnedOptions(rule_file=str(path), threshold=0.9))
    assert strict.decide(_request("prove it"), None).depth is Depth.FAST
    assert strict.decide(_request(""), None) == Decision(Depth.FAST, "learned: no text")
