"""One server whose draft server lies, and whose clients draft for their own requests."""

import asyncio
import json
import threading

import httpx
import pytest
from asking import ask, ask_all, metrics_when
from draft_servers import ServerThread, answering, lying

from vllm_instant.remote.client import DraftPusher, new_key

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
    # Few are verified: their confidence falls soon.
    totals = metrics_when(server, lambda now: now.get(PROPOSED, 0) > 20)
    assert totals[PROPOSED] > 20
    assert "vllm_instant:plugin_failures_total" not in totals
    assert counts["lie"] > 1000
    assert counts["invalid"] > 10


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
