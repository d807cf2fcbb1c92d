"""A cascade with a draft model as the fast end of an escalation, whose deep end is vLLM alone: one server for both."""

import json

import httpx
import pytest
from asking import ask, metrics_when
from deployments import DRAFT_MODEL

from vllm_instant.escalation.deep_server import FORWARDED
from vllm_instant.tools.measure.server_info import read_decisions

DEPLOYMENT = (
    DRAFT_MODEL
    + """
[rejection_sampler]
plugin = "cascade"
epsilon = 1.0
rule = "chow"
alpha = 1.0

[escalation]
plugin = "label"
threshold = 0.0
deep_url = "DEEP"
deep_is_guarded = true
escalate_stopped = true

[guard]
plugin = "rules"
words = ["zebra"]
"""
)
BY, WHY = "x-instant-answered-by", "x-instant-escalation"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CHAT = {"messages": [{"role": "user", "content": "def main():"}]}
REQUESTS = {
    "whole": {"prompt": "def main():", "max_tokens": 16, "logprobs": 2},
    "streamed": {"prompt": "def main():", "max_tokens": 16, "stream": True, "stream_options": {"include_usage": True}},
    "n": {"prompt": "def main():", "max_tokens": 8, "n": 2, "seed": 3, "temperature": 1.0},
    "schema": {"prompt": "{", "max_tokens": 24, "structured_outputs": {"json": SCHEMA}},
    "chat": {**CHAT, "max_tokens": 8},
    "chat, streamed": {**CHAT, "max_tokens": 8, "stream": True},
}


@pytest.fixture(scope="module")
def server(launch, baseline):
    with launch(DEPLOYMENT.replace("DEEP", baseline.url)) as running:
        yield running


def _sent(server, request, choice=None):
    """The answer without what differs between two equal requests, and its headers."""
    body = {"model": "demo", "temperature": 0, **request}
    if choice is not None:
        body["vllm_xargs"] = {"instant_escalation": choice}
    path = "chat/completions" if "messages" in body else "completions"
    response = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=300)
    assert response.status_code == 200, response.text
    parts = [response.text]
    if body.get("stream"):
        parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
        assert parts.pop() == "[DONE]"
    found = [json.loads(part) for part in parts]
    for part in found:
        del part["id"], part["created"]
    return found, response.headers


def _text(parts):
    """The text of all parts and choices."""
    choices = [choice for part in parts for choice in part["choices"]]
    messages = [choice.get("message") or choice.get("delta") or {"content": choice.get("text")} for choice in choices]
    return "".join(message.get("content") or "" for message in messages)


@pytest.mark.parametrize("name", REQUESTS)
def test_both_ends_answer_as_if_asked_directly(server, baseline, name):
    direct, _ = _sent(baseline, REQUESTS[name])
    deep, headers = _sent(server, REQUESTS[name], "deep")
    assert (headers[BY], headers[WHY]) == ("deep", "the client's choice")
    fast, headers = _sent(server, REQUESTS[name], "fast")
    assert headers[BY] == "fast"
    if len(direct) == 1:
        assert deep == direct
    # vLLM puts several tokens into one event where they are there at once. Greedy and seeded requests are exact under
    # a cascade as well.
    assert _text(deep) == _text(direct) == _text(fast) != ""


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_guard_stops_unread_is_answered_by_the_deep_end(server, baseline, stream):
    request = {"prompt": "def zebra():", "max_tokens": 8, "stream": stream}
    direct, _ = _sent(baseline, request)
    sent, headers = _sent(server, request, "fast")
    assert (headers[BY], headers[WHY]) == ("deep", "the guard stopped the fast answer")
    assert _text(sent) == _text(direct) != ""


@pytest.mark.parametrize(
    "request_",
    [{"prompt": "def zebra():"}, {"messages": [{"role": "user", "content": "A zebra?"}]}],
    ids=["completion", "chat"],
)
def test_a_stream_that_is_stopped_before_its_first_token_says_so(server, request_):
    path = "chat/completions" if "messages" in request_ else "completions"
    body = {"model": "demo", "max_tokens": 8, "stream": True, **request_}
    # As a request that another server has escalated, it is answered here in any case.
    response = httpx.post(f"{server.url}/v1/{path}", json=body, headers={FORWARDED: "1"}, timeout=300)
    events = [json.loads(part.removeprefix("data: ")) for part in response.text.split("\n\n") if "{" in part]
    assert _text(events) == ""
    assert events[-1]["choices"][0]["finish_reason"] == "content_filter"


def test_the_model_itself_chooses_with_one_token_behind_the_same_prompt(server, prompts):
    before = server.metrics()
    _, headers = _sent(server, {"prompt": prompts[0][:600], "max_tokens": 4})
    # Every probability reaches the threshold of 0; without yes or no among the likeliest tokens it stays fast.
    assert (headers[BY], headers[WHY].split(";")[0]) in (("deep", "label"), ("fast", "label: no answer"))
    counter = "vllm:generation_tokens_total"
    after = metrics_when(server, lambda metrics: metrics[counter] > before[counter])
    assert after[counter] - before[counter] == (1 if headers[BY] == "deep" else 5)
    decisions = read_decisions(server.url, {"last": 1}, route="escalation")["engines"][0]["decisions"]
    assert decisions[0]["answered_by"] == headers[BY]
    name = "vllm_instant:escalation_decision_seconds_count"
    assert after[name] == before[name] + 1


def test_without_bound_and_deferral_the_draft_model_speaks_for_itself(server, prompts):
    before = server.metrics()
    for prompt in prompts[:4]:
        for _ in range(2):
            ask(server, prompt[:300], temperature=1.0, vllm_xargs={"instant_escalation": "fast"})
    after = metrics_when(
        server,
        lambda m: m["vllm:spec_decode_num_draft_tokens_total"] > before["vllm:spec_decode_num_draft_tokens_total"] + 99,
    )
    accepted, proposed = (
        after[f"vllm:spec_decode_num_{name}_tokens_total"] - before[f"vllm:spec_decode_num_{name}_tokens_total"]
        for name in ("accepted", "draft")
    )
    assert proposed > 99
    assert accepted / proposed > 0.99  # all but for rounding
    assert not any("plugin_failures" in name and value for name, value in after.items())
