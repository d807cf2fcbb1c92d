"""One server whose draft server lies, and whose clients draft for their own requests."""

import asyncio
import json
import threading

import httpx
import numpy as np
import pytest
from asking import ask, ask_all, settled_metrics
from draft_servers import ServerThread, answering, lying, wait_until

from vllm_instant.remote.client import DraftPusher, new_key
from vllm_instant.tools.draft_server.served_model import ServedModel

DEPLOYMENT = """
[speculation]
plugin = "cycling"
[drafter]
plugin = "remote"
url = "URL"
num_speculative_tokens = 6
client_drafts = true
"""
PROPOSED = "vllm_instant:draft_tokens_proposed_total"
VLLM_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
VOCABULARY = 4096


@pytest.fixture(scope="module")
def counts():
    return {}


@pytest.fixture(scope="module")
def drafting(counts):
    with ServerThread(lying(VOCABULARY, counts)) as server:
        yield server


@pytest.fixture(scope="module")
def server(launch, drafting):
    with launch(DEPLOYMENT.replace("URL", drafting.url)) as running:
        yield running


def test_fifty_greedy_answers_are_the_same_with_a_draft_server_that_lies(server, prompts, expected, counts):
    assert ask_all(server, prompts) == expected
    totals = server.metrics()
    assert "vllm_instant:plugin_failures_total" not in totals
    assert counts["lie"] > 100
    assert counts["invalid"] > 0


def test_drafts_that_begin_right_and_end_wrong(server, drafting, prompts, expected):
    """A liar that knows nothing is hardly ever verified: a token is committed before its lie arrives."""
    asked = [ask(server, prompt, return_token_ids=True)[0] for prompt in prompts[:6]]
    known = [choice["prompt_token_ids"] + choice["token_ids"] for choice in asked]

    def half_true(tokens):
        [rest] = [answer[len(tokens) :] for answer in known if answer[: len(tokens)] == tokens]
        return [*rest[:2], *(0 for _ in range(4))]

    before, connections = server.metrics(), drafting.num_connections
    drafting.handler = answering(half_true)
    drafting.lose_connections()
    wait_until(lambda: drafting.num_connections > connections)
    assert ask_all(server, prompts[:6], vllm_xargs={"instant_speculation": 6}) == expected[:6]
    totals = settled_metrics(server)  # vLLM's counters and ours are not of the same moment while answers are generated
    proposed, accepted = (totals[name] - before.get(name, 0) for name in (PROPOSED, VLLM_ACCEPTED))
    assert proposed >= 20
    assert accepted < proposed


def test_answers_are_the_same_when_the_draft_server_is_gone(server, drafting, prompts, expected):
    leaving = threading.Timer(0.3, drafting.lose_connections)
    leaving.start()
    assert ask_all(server, prompts[:12]) == expected[:12]
    leaving.join()


def test_a_client_drafts_for_its_own_request(server, drafting, prompts):
    drafting.handler = answering(lambda tokens: [])
    drafting.lose_connections()
    prompt = prompts[0][:200]
    [known] = ask(server, prompt, max_tokens=120, return_token_ids=True)
    before = server.metrics().get(VLLM_ACCEPTED, 0)

    async def stream(key, pushed_under):
        body = {"model": "demo", "prompt": prompt, "max_tokens": 120, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True, "vllm_xargs": {"instant_draft_key": key}}
        output = []
        async with (
            DraftPusher(server.url, pushed_under) as drafts,
            httpx.AsyncClient(timeout=60) as client,
            client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
        ):
            assert drafts.vocab_size == VOCABULARY
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    new = json.loads(line[6:])["choices"][0]["token_ids"] or []
                    if new and not output:
                        await drafts.begin(len(new), known["token_ids"][len(new) : len(new) + 110])
                    output += new
        return output

    key = new_key()
    # Under the key of no request nothing arrives.
    assert asyncio.run(stream(key, new_key())) == known["token_ids"]
    assert server.metrics().get(VLLM_ACCEPTED, 0) == before
    assert asyncio.run(stream(key, key)) == known["token_ids"]
    assert server.metrics()[VLLM_ACCEPTED] > before + 20


def test_a_key_that_is_too_short_is_refused(server):
    body = {"model": "demo", "prompt": "a", "vllm_xargs": {"instant_draft_key": "short"}}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    assert response.status_code == 400
    assert "must be a string of 16 to 128 characters" in response.text


def test_a_model_that_vllm_serves_drafts_what_it_would_say(baseline, prompts):
    model = ServedModel(baseline.url, VOCABULARY)
    for prompt in prompts[:3]:
        [known] = ask(baseline, prompt, max_tokens=6, return_token_ids=True)
        guesses = model.draft("r", "a", np.array(known["prompt_token_ids"], np.int32), 6, VOCABULARY)
        assert [guess.token for guess in guesses] == known["token_ids"]
        assert all(0 <= guess.other_probability <= guess.probability + 1e-6 <= 1.00001 for guess in guesses)
        assert all(guess.other != guess.token for guess in guesses)
