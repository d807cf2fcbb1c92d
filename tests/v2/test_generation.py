"""vLLM's V2 and asynchronous runners with a tiny model, its draft model and draft lengths that change every step."""

from __future__ import annotations

import pytest
from v2.generate import Job

PROMPTS = ["def main():", "class LRUCache:\n    def __init__(self"]
DRAFTER = '[drafter]\nplugin = "model"\nmodel = "{draft}"\nnum_speculative_tokens = 3\n'
VARYING = '[speculation]\nplugin = "cycling"\n' + DRAFTER
NEVER = '[speculation]\nplugin = "fixed"\nnum_draft_tokens = 0\n' + DRAFTER
RUNNERS = {
    "V2, asynchronous": {"runner": "V2", "asynchronous": True},
    "V2, synchronous": {"runner": "V2", "asynchronous": False},
    "V1, asynchronous": {"runner": "V1", "asynchronous": True},
}
SAMPLERS = ("block", "token")


@pytest.fixture(scope="module")
def results(generated, demo_pair):
    def job(deployment=None, **options):
        text = None if deployment is None else deployment.format(draft=demo_pair.draft)
        return Job(str(demo_pair.target), PROMPTS, deployment=text, **options)

    jobs = {"alone": job(), "undrafted": job(NEVER)}
    jobs |= {name: job(VARYING, **runner) for name, runner in RUNNERS.items()}
    for sampler in SAMPLERS:
        deployment = VARYING + f'[rejection_sampler]\nplugin = "{sampler}"\n'
        jobs[sampler] = job(deployment, runner="V1", temperature=1.0)
    return generated(jobs)


@pytest.fixture(scope="module")
def alone(results):
    """VLLM without speculation, on the V2 runner."""
    return results["alone"]


@pytest.fixture(scope="module")
def undrafted(results):
    return results["undrafted"]


@pytest.fixture(params=RUNNERS)
def drafting(request, results):
    return request.param, results[request.param]


def test_it_runs_where_it_should(drafting):
    name, result = drafting
    assert ("worker.cpu.model_runner" in result["runner"]) == name.startswith("V2")
    assert result["asynchronous"] == name.endswith(" asynchronous")
    assert result["scheduler"] == ("InstantAsyncScheduler" if result["asynchronous"] else "InstantScheduler")


def test_greedy_answers_are_those_without_speculation(drafting, alone):
    _, result = drafting
    assert result["token_ids"] == alone["token_ids"]


def test_draft_lengths_vary_and_counts_are_the_truth(drafting):
    _, result = drafting
    assert {0, 1} < set(result["steps"])
    totals = result["totals"]["speculation"]
    # Each request has one token of its prompt's step; all others are accepted drafts or the token after them.
    assert totals["proposed"] == result["proposed"] > totals["accepted"] == result["accepted"] > 0
    assert result["totals"]["failures"] == []


def test_the_draft_model_runs_as_many_steps_as_are_planned(drafting):
    name, result = drafting
    if name.startswith("V1"):
        pytest.skip("tests/vllm_instant/patches counts the passes of the V1 runner")
    assert {0, 1, 2, 3} <= set(result["planned"])
    assert result["draft_model_calls"] == sum(max(1, planned) for planned in result["planned"])
    assert result["draft_samples"] == sum(result["planned"])


def test_no_step_of_the_v2_runner_waits_for_the_device(results):
    assert results["V2, asynchronous"]["host_syncs"] == []


def test_without_drafts_nothing_is_verified(undrafted, alone):
    assert undrafted["token_ids"] == alone["token_ids"]
    assert set(undrafted["steps"]) == {0}


def test_without_drafts_the_draft_model_only_reads_along(undrafted):
    assert undrafted["draft_model_calls"] == len(undrafted["planned"])
    assert undrafted["draft_samples"] == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_serve_steps_without_drafts_under_asynchronous_scheduling(results, sampler):
    assert [len(tokens) for tokens in results[sampler]["token_ids"]] == [24, 24]
    assert results[sampler]["sampler_failures"] == 0
