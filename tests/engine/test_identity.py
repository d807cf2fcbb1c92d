"""Float32 greedy answers are those of stock vLLM, with speculation on and budgets that change every step.

Prompts are read in pieces (chunked prefill) between the steps of others, and the KV cache is too small for all requests
at once, so that some are preempted and begin again; the prefix cache is on, as it is by default.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from asking import ask, ask_all
from deployments import DRAFT_MODEL, EXAMPLE, HYBRID, NGRAM, SUFFIX

DEPLOYMENTS = {
    "draft_model": DRAFT_MODEL,
    "ngram": NGRAM,
    "suffix": SUFFIX,
    "hybrid": HYBRID,
    "example_plugins": EXAMPLE,
}
PROPOSED, VLLM_PROPOSED = "vllm_instant:draft_tokens_proposed_total", "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED, VLLM_ACCEPTED = "vllm_instant:draft_tokens_accepted_total", "vllm:spec_decode_num_accepted_tokens_total"
TIGHT = ("--max-num-batched-tokens", "96", "--block-size", "32", "--num-gpu-blocks-override", "40")


@pytest.fixture(scope="module", params=DEPLOYMENTS)
def server(request, launch):
    with launch(DEPLOYMENTS[request.param], *TIGHT) as running:
        yield running


def _draft_length(server):
    served = httpx.get(f"{server.url}/v1/instant/deployment").json()
    return served["slots"]["drafter"]["options"]["num_speculative_tokens"]


def _padding(totals):
    """What vLLM counts beside drafts: it pads a new request with one token left to read to the full draft length."""
    return totals.get(VLLM_PROPOSED, 0) - totals.get(PROPOSED, 0)


def _settled(server, length):
    """The metrics once ours, which the API server asks the engine for every second, have caught up with vLLM's."""
    deadline = time.monotonic() + 10
    while True:
        time.sleep(0.5)
        totals = server.metrics()
        # A step that ours lack may look like padding: its accepted tokens tell them apart.
        equal = _padding(totals) in range(0, 4 * length, length) and totals[ACCEPTED] == totals[VLLM_ACCEPTED]
        if equal or time.monotonic() > deadline:
            return totals


def test_fifty_prompts_and_the_numbers_behind_them(server, prompts, expected):
    assert ask_all(server, prompts) == expected

    length = _draft_length(server)
    totals = _settled(server, length)
    proposed = totals[PROPOSED]
    assert proposed > 100
    # Depends on how many cached prompts happen to end one token before a block does: none, one, rarely two.
    assert _padding(totals) in range(0, 4 * length, length)
    assert totals[ACCEPTED] == totals[VLLM_ACCEPTED] > 10
    assert totals["vllm_instant:draft_tokens_budgeted_total"] >= proposed
    assert totals["vllm_instant:plugin_info"] == 7
    assert "vllm_instant:plugin_failures_total" not in totals
    if httpx.get(f"{server.url}/v1/instant/deployment").json()["slots"]["batching"]["plugin"] != "fcfs":
        # Whatever the order, and however small the pieces: everybody started once.
        assert totals["vllm_instant:requests_started_total"] == len(prompts)


def test_a_seed_says_what_it_says_without_speculation(server, stock, prompts):
    """To the letter, whoever drafts and however much."""

    def texts(where):
        with ThreadPoolExecutor(4) as pool:
            asked = enumerate(prompts[:4])
            return list(pool.map(lambda a: ask(where, a[1][:500], temperature=1.0, seed=a[0])[0]["text"], asked))

    assert texts(server) == texts(stock)


@pytest.fixture(scope="module")
def long_answers(stock, prompts):
    """Eight short prompts with answers that together do not fit into the small KV cache, and what stock says."""
    beginnings = [prompt[:60] for prompt in prompts[:8]]
    return beginnings, ask_all(stock, beginnings, max_tokens=260)


def test_preempted_requests_begin_again_and_say_the_same(server, long_answers):
    beginnings, answers = long_answers
    assert ask_all(server, beginnings, max_tokens=260) == answers
    assert server.metrics()["vllm:num_preemptions_total"] > 0


def test_answers_that_fill_the_models_length(server, stock, prompts):
    long = "\n".join(prompts)[:9000]
    ours, theirs = (ask(where, long, max_tokens=None, truncate_prompt_tokens=960) for where in (server, stock))
    assert ours[0]["text"] == theirs[0]["text"]
    assert ours[0]["finish_reason"] == theirs[0]["finish_reason"] == "length"


def test_requests_that_are_aborted_in_flight_harm_nobody(server, prompts, expected):
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
