"""Float32 greedy answers are those of stock vLLM, with speculation on and budgets that change every step."""

import time

import pytest
from asking import ask, ask_all
from deployments import DRAFT_MODEL, EXAMPLE, NGRAM


@pytest.fixture(scope="module", params=["draft_model", "ngram", "example_plugins"])
def server(request, launch):
    deployment = {"draft_model": DRAFT_MODEL, "ngram": NGRAM, "example_plugins": EXAMPLE}[request.param]
    with launch(deployment) as running:
        yield running


def _settled(server):
    time.sleep(1.5)  # the API server asks the engine once a second
    return server.metrics()


def test_fifty_prompts_and_the_numbers_behind_them(server, prompts, expected):
    assert ask_all(server, prompts) == expected

    totals = _settled(server)
    proposed = totals["vllm_instant:draft_tokens_proposed_total"]
    assert proposed > 100
    assert proposed == totals["vllm:spec_decode_num_draft_tokens_total"]
    assert totals["vllm_instant:draft_tokens_accepted_total"] == totals["vllm:spec_decode_num_accepted_tokens_total"]
    assert totals["vllm_instant:draft_tokens_accepted_total"] > 10
    assert totals["vllm_instant:draft_tokens_budgeted_total"] >= proposed
    assert totals["vllm_instant:plugin_info"] == 7
    assert "vllm_instant:plugin_failures_total" not in totals


@pytest.mark.parametrize(
    "parameters",
    [
        {"logprobs": 3},
        {"stop": ["\n\n", "self"]},
        {"n": 2, "temperature": 1.0, "top_k": 1},
        {"presence_penalty": 0.7, "repetition_penalty": 1.1},
        {"structured_outputs": {"regex": "[a-z_]{3,9}\\([a-z]*\\)"}, "ignore_eos": False},
    ],
    ids=lambda parameters: next(iter(parameters)),
)
def test_other_features_are_identical_too(server, stock, prompts, parameters):
    for prompt in prompts[:4]:
        ours, theirs = ask(server, prompt, **parameters), ask(stock, prompt, **parameters)
        assert [c["text"] for c in ours] == [c["text"] for c in theirs]
        assert [c["finish_reason"] for c in ours] == [c["finish_reason"] for c in theirs]
        if "logprobs" in parameters:
            assert ours[0]["logprobs"]["tokens"] == theirs[0]["logprobs"]["tokens"]
            assert ours[0]["logprobs"]["token_logprobs"] == pytest.approx(
                theirs[0]["logprobs"]["token_logprobs"], abs=1e-3
            )
