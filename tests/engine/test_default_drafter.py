"""A server that names no drafter: lookup drafts by default, and what vLLM refuses beside speculation still works."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from asking import ask, ask_all

REPEATED = "alpha = 1\nbeta = 2\ngamma = 3\ndelta = 4\n" * 6


@pytest.fixture(scope="module")
def server(launch):
    with launch("") as running:
        yield running


def test_repetition_is_drafted_without_any_configuration(server):
    before = server.metrics()
    assert before.get("vllm_instant:plugin_info") == 7
    for _ in range(3):
        ask(server, REPEATED, max_tokens=96)
    assert server.metrics()["vllm:spec_decode_num_accepted_tokens_total"] > 60


def test_what_was_written_before_a_pause_is_drafted_behind_it(server):
    """Between the two requests nobody is served, so that no step with drafts says that the first one has ended."""

    def accepted():
        time.sleep(2.5)  # the metrics are polled once a second
        return server.metrics()["vllm:spec_decode_num_accepted_tokens_total"]

    prompt = {"vllm_xargs": {"instant_speculation": 8}, "max_tokens": 96}
    before = accepted()
    ask(server, "def first_of(numbers):", **prompt)
    first = accepted()
    ask(server, "def first_of(numbers):", **prompt)
    assert accepted() - first > max(first - before, 60)


def test_an_idle_server_sleeps(server):
    ask(server, REPEATED)
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]

    def seconds():
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    time.sleep(3)
    before = seconds()
    time.sleep(3)
    assert seconds() - before < 1.0, "a worker that waits for a message within a second takes a whole core"


def test_fifty_prompts_are_answered_as_by_stock(server, prompts, expected):
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
def test_sampling_that_stock_refuses_beside_speculation(server, stock, prompts, parameters):
    wanted = [ask(stock, prompt, **parameters)[0]["text"] for prompt in prompts[:4]]
    assert [ask(server, prompt, **parameters)[0]["text"] for prompt in prompts[:4]] == wanted
    if "temperature" in parameters:
        return
    # Beside requests that are drafted for, in the same steps.
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
