"""Float32 greedy answers equal vLLM's, with speculation on and budgets that change every step.

Chunked prefill mixes prompts with decoding, and the KV cache is too small for all requests at once, so that some are
preempted and recomputed; the prefix cache is on, as it is by default.
"""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from asking import ask, ask_all, metrics_when
from deployments import DRAFT_MODEL, EXAMPLE, HYBRID, NGRAM, SUFFIX

from vllm_instant.deployment.slots import SLOTS

DEPLOYMENTS = {
    "draft_model": DRAFT_MODEL,
    "ngram": NGRAM,
    "suffix": SUFFIX,
    "hybrid": HYBRID,
    "example_plugins": EXAMPLE,
}
PROPOSED, VLLM_PROPOSED = "vllm_instant:draft_tokens_proposed_total", "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED, VLLM_ACCEPTED = "vllm_instant:draft_tokens_accepted_total", "vllm:spec_decode_num_accepted_tokens_total"
RECORD = {
    "type": "object",
    "properties": {
        "module": {"type": "string", "maxLength": 24},
        "line": {"type": "integer", "minimum": 0, "maximum": 9999},
        "args": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["module", "line", "args"],
    "additionalProperties": False,
}
TIGHT = ("--max-num-batched-tokens", "96", "--block-size", "32", "--num-gpu-blocks-override", "40")


# `hybrid` drafts with vLLM's draft model and with a lookup as well.
NIGHTLY = ("draft_model", "ngram")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.nightly if name in NIGHTLY else ()) for name in DEPLOYMENTS],
)
def server(request, launch):
    with launch(DEPLOYMENTS[request.param], *TIGHT) as running:
        yield running


def _draft_length(server):
    served = httpx.get(f"{server.url}/v1/instant/deployment").json()
    return served["slots"]["drafter"]["options"]["num_speculative_tokens"]


def _padding(totals):
    """Padding that vLLM counts as drafts: a request with one uncached prompt token is padded to the full length."""
    return totals.get(VLLM_PROPOSED, 0) - totals.get(PROPOSED, 0)


def _settled(server, length):
    """The metrics after ours, which the API server polls every second, have caught up with vLLM's."""

    def caught_up(totals):
        # A step that our counters lack may look like padding; the accepted tokens distinguish the two.
        return _padding(totals) in range(0, 4 * length, length) and totals[ACCEPTED] == totals[VLLM_ACCEPTED]

    return metrics_when(server, caught_up)


def test_fifty_prompts_and_their_metrics(server, prompts, expected):
    assert ask_all(server, prompts) == expected

    length = _draft_length(server)
    totals = _settled(server, length)
    proposed = totals[PROPOSED]
    assert proposed > 100
    # The number of cached prompts that end one token before a block boundary: none, one, rarely two.
    assert _padding(totals) in range(0, 4 * length, length)
    assert totals[ACCEPTED] == totals[VLLM_ACCEPTED] > 10
    assert totals["vllm_instant:draft_tokens_budgeted_total"] >= proposed
    assert totals["vllm_instant:plugin_info"] == len(SLOTS)
    assert "vllm_instant:plugin_failures_total" not in totals
    if httpx.get(f"{server.url}/v1/instant/deployment").json()["slots"]["batching"]["plugin"] != "fcfs":
        # Every request started once, whatever the order and the chunk size.
        assert totals["vllm_instant:requests_started_total"] == len(prompts)


def test_a_seed_gives_the_answer_that_it_gives_without_speculation(server, baseline, prompts):
    def texts(where):
        with ThreadPoolExecutor(4) as pool:
            asked = enumerate(prompts[:4])
            return list(pool.map(lambda a: ask(where, a[1][:500], temperature=1.0, seed=a[0])[0]["text"], asked))

    assert texts(server) == texts(baseline)


@pytest.fixture(scope="module")
def long_answers(baseline, prompts):
    """Eight short prompts whose answers together exceed the small KV cache, and the baseline's answers."""
    beginnings = [prompt[:60] for prompt in prompts[:8]]
    return beginnings, ask_all(baseline, beginnings, max_tokens=260)


def test_preempted_requests_are_recomputed_with_the_same_answers(server, long_answers):
    beginnings, answers = long_answers
    assert ask_all(server, beginnings, max_tokens=260) == answers
    assert server.metrics()["vllm:num_preemptions_total"] > 0


def test_answers_that_fill_the_models_length(server, baseline, prompts):
    long = "\n".join(prompts)[:9000]
    ours, theirs = (ask(where, long, max_tokens=None, truncate_prompt_tokens=960) for where in (server, baseline))
    assert ours[0]["text"] == theirs[0]["text"]
    assert ours[0]["finish_reason"] == theirs[0]["finish_reason"] == "length"


def test_requests_aborted_in_flight_do_not_affect_others(server, prompts, expected):
    def abandon(prompt):
        body = {"model": "demo", "prompt": prompt, "max_tokens": 200, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as response:
            for number, _ in enumerate(response.iter_lines()):
                if number > 8:
                    return

    with ThreadPoolExecutor(4) as pool:
        abandoned = pool.map(abandon, prompts[10:18])
        assert ask_all(server, prompts[:8]) == expected[:8]
        list(abandoned)
    assert ask_all(server, prompts[10:18]) == expected[10:18]


@pytest.mark.parametrize(
    "parameters",
    [
        {"logprobs": 3},
        {"stop": ["\n\n", "self"]},
        {"n": 2, "temperature": 1.0, "top_k": 1},
        {"presence_penalty": 0.7, "repetition_penalty": 1.1},
        {"structured_outputs": {"regex": "[a-z_]{3,9}\\([a-z]*\\)"}, "ignore_eos": False},
        {"structured_outputs": {"json": RECORD}, "ignore_eos": False, "max_tokens": 160},
    ],
    ids=["logprobs", "stop", "n", "penalties", "regex", "json"],
)
def test_other_features_are_identical_too(server, baseline, prompts, parameters):
    for prompt in prompts[:4]:
        ours, theirs = ask(server, prompt, **parameters), ask(baseline, prompt, **parameters)
        assert [c["text"] for c in ours] == [c["text"] for c in theirs]
        assert [c["finish_reason"] for c in ours] == [c["finish_reason"] for c in theirs]
        if "logprobs" in parameters:
            assert ours[0]["logprobs"]["tokens"] == theirs[0]["logprobs"]["tokens"]
            assert ours[0]["logprobs"]["token_logprobs"] == pytest.approx(
                theirs[0]["logprobs"]["token_logprobs"], abs=1e-3
            )
