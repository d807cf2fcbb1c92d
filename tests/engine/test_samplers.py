"""Rejection samplers in a real server: seeds, log-probabilities, penalties, masks and grammars beside drafts.

Draft lengths change with every step and request (the test policy ``cycling``), as a real policy's do with the load.
"""

import json

import pytest
from asking import ask
from deployments import DRAFT_MODEL, SUFFIX

SAMPLERS = ("block", "token", "relaxed\nepsilon = 0.2")
SAMPLING = {
    "plain": {"temperature": 1.0},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_k": {"temperature": 1.2, "top_k": 20},
    "penalties": {"temperature": 0.9, "presence_penalty": 0.8, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    "bad_words": {"temperature": 1.0, "bad_words": [" the", "self"]},
    "min_tokens": {"temperature": 1.0, "min_tokens": 8, "ignore_eos": False},
}


@pytest.fixture(scope="module", params=SAMPLERS, ids=lambda text: text.partition("\n")[0])
def server(request, launch):
    name, _, options = request.param.partition("\n")
    with launch(f'{DRAFT_MODEL}\n[rejection_sampler]\nplugin = "{name}"\n{options}\n') as running:
        yield running


def _proposed(server):
    return server.metrics()["vllm:spec_decode_num_draft_tokens_total"]


@pytest.mark.parametrize("parameters", SAMPLING.values(), ids=SAMPLING)
def test_a_seed_says_what_it_says_without_speculation(server, stock, prompts, parameters):
    """To the letter, with drafts and whatever their lengths; also for lossy samplers."""
    before = _proposed(server)
    for seed, prompt in enumerate(prompts[:6]):
        ours, theirs = (ask(where, prompt[:400], seed=seed, **parameters)[0]["text"] for where in (server, stock))
        assert ours == theirs
    assert _proposed(server) > before


def test_requests_side_by_side_keep_their_seeds(server, stock, prompts):
    """Seeded, unseeded and greedy requests in one batch."""
    from concurrent.futures import ThreadPoolExecutor

    def parameters(number):
        return ({"temperature": 1.0, "seed": number}, {"temperature": 1.0}, {"temperature": 0})[number % 3]

    def texts(where):
        with ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(ask, where, prompts[number][:300], **parameters(number)) for number in range(12)]
            return [job.result()[0]["text"] for job in jobs]

    ours, again, theirs = texts(server), texts(server), texts(stock)
    for number in range(12):
        if number % 3 != 1:
            assert ours[number] == again[number] == theirs[number]
    assert any(ours[number] != again[number] for number in range(1, 12, 3))


def test_log_probabilities_are_those_of_the_tokens(server, stock, prompts):
    request = {"temperature": 1.0, "seed": 5, "logprobs": 3, "return_token_ids": True}
    ours, theirs = (ask(where, prompts[3][:300], **request)[0] for where in (server, stock))
    assert ours["token_ids"] == theirs["token_ids"]
    assert ours["logprobs"]["tokens"] == theirs["logprobs"]["tokens"]
    assert ours["logprobs"]["token_logprobs"] == pytest.approx(theirs["logprobs"]["token_logprobs"], abs=1e-3)
    unseeded = ask(server, prompts[3][:300], temperature=1.0, logprobs=2)[0]["logprobs"]
    assert len(unseeded["token_logprobs"]) == 48
    assert all(value <= 0 for value in unseeded["token_logprobs"])


def test_masks_hold_for_drafts_and_what_follows_them(server, prompts):
    allowed = [40, 41, 42, 43, 44, 300, 301]
    choice = ask(server, prompts[0][:200], temperature=1.0, allowed_token_ids=allowed, return_token_ids=True)[0]
    assert set(choice["token_ids"]) <= set(allowed)


def test_structured_output_keeps_its_grammar(server, prompts):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for seed in (None, 1):
        text = ask(
            server,
            prompts[1][:100],
            temperature=1.0,
            seed=seed,
            max_tokens=60,
            ignore_eos=False,
            structured_outputs={"json": schema, "whitespace_pattern": " ?"},
        )[0]["text"]
        if text.rstrip().endswith("}"):
            assert isinstance(json.loads(text)["a"], int)
        else:
            assert text.lstrip().startswith("{")


def test_lookups_keep_seeds_too(launch, stock, prompts):
    with launch(SUFFIX) as server:
        for seed, prompt in enumerate(prompts[:4]):
            ours, theirs = (ask(where, prompt[:600], temperature=1.0, seed=seed)[0] for where in (server, stock))
            assert ours["text"] == theirs["text"]
        assert _proposed(server) > 0
