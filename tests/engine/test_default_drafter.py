"""A server without a drafter in its file drafts by lookup, and still serves what vLLM refuses beside speculation."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from asking import ask, ask_all, settled_metrics
from feature_answers import answers, difference
from request_features import single_features

from vllm_instant.deployment.slots import SLOTS

REPEATED = "alpha = 1\nbeta = 2\ngamma = 3\ndelta = 4\n" * 6


@pytest.fixture(scope="module")
def server(launch):
    with launch("") as running:
        yield running


def test_repetition_is_drafted_without_any_configuration(server):
    before = server.metrics()
    assert before.get("vllm_instant:plugin_info") == len(SLOTS)
    for _ in range(3):
        ask(server, REPEATED, max_tokens=96)
    assert server.metrics()["vllm:spec_decode_num_accepted_tokens_total"] > 60


def test_an_output_is_drafted_from_after_the_server_was_idle(server):
    """The server is idle between the requests, so that no step reports the end of the first one to the drafter."""

    def accepted():
        return settled_metrics(server)["vllm:spec_decode_num_accepted_tokens_total"]

    # Without a cache salt no request is drafted from another's output.
    prompt = {"vllm_xargs": {"instant_speculation": 8}, "max_tokens": 96, "cache_salt": "one client"}
    before = accepted()
    ask(server, "def first_of(numbers):", **prompt)
    first = accepted()
    ask(server, "def first_of(numbers):", **prompt)
    assert accepted() - first > max(first - before, 60)


@pytest.mark.perf
def test_an_idle_server_sleeps(server):
    ask(server, REPEATED)
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]

    def seconds():
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    time.sleep(3)
    before = seconds()
    time.sleep(3)
    assert seconds() - before < 1.0, "a worker that polls for messages takes a whole core"


def test_fifty_prompts_are_answered_as_by_the_baseline(server, prompts, expected):
    assert ask_all(server, prompts) == expected


@pytest.mark.parametrize(
    "parameters",
    [
        {"logit_bias": {"17": 4.0, "300": -100.0}},
        {"min_p": 0.2, "temperature": 1.0, "seed": 7},
        {"min_tokens": 20, "ignore_eos": False},
    ],
    ids=lambda parameters: next(iter(parameters)),
)
def test_sampling_that_vllm_refuses_beside_speculation(server, baseline, prompts, parameters):
    wanted = [ask(baseline, prompt, **parameters)[0]["text"] for prompt in prompts[:4]]
    assert [ask(server, prompt, **parameters)[0]["text"] for prompt in prompts[:4]] == wanted
    if "temperature" in parameters:
        return
    # In the same steps as requests with drafts.
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(lambda: [ask(server, REPEATED, max_tokens=96) for _ in range(6)])
        assert [ask(server, prompt, **parameters)[0]["text"] for prompt in prompts[:4]] == wanted
        beside.result()


def test_such_a_request_gets_no_drafts(server):
    body = {"model": "demo", "prompt": REPEATED, "max_tokens": 64, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(f"{server.url}/v1/completions", json=body | {"logit_bias": {"5": 0.5}}, timeout=300).json()
    assert reply["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0
    pinned = body | {"logit_bias": {"5": 0.5}, "vllm_xargs": {"instant_speculation": 4}}
    reply = httpx.post(f"{server.url}/v1/completions", json=pinned, timeout=300).json()
    assert reply["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0


@pytest.mark.perf
def test_every_request_option_is_answered_as_by_the_baseline_with_and_without_drafts(server, baseline):
    features = single_features()
    theirs = answers(baseline.url, features)
    for drafts in (None, 8):
        ours = answers(server.url, features, drafts)
        assert {name: found for name in ours if (found := difference(ours[name], theirs[name]))} == {}
