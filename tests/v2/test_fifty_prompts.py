"""Fifty prompts on the V2 and the asynchronous V1 runner: greedy answers are vLLM's own, whatever is drafted."""

from __future__ import annotations

import pytest
from v2.generate import Job

from vllm_instant.tools.measure.prompts import free, snippets

PROMPTS = [
    prompt.text
    for prompt in (
        *snippets("code", 0.0, 20, "fifty"),
        *snippets("structured", 0.0, 15, "fifty"),
        *free(15, "fifty"),
    )
]
VARYING = (
    '[speculation]\nplugin = "cycling"\n[drafter]\nplugin = "model"\nmodel = "{draft}"\nnum_speculative_tokens = 3\n'
)
DECIDED = '[speculation]\nkeep_costs = false\n[drafter]\nplugin = "suffix"\nnum_speculative_tokens = 4\n'
LOOKUP = '[speculation]\nplugin = "fixed"\n[drafter]\nplugin = "suffix"\nnum_speculative_tokens = 4\n'
HYBRID = (
    '[speculation]\nplugin = "fixed"\n[drafter]\nplugin = "hybrid"\nmodel = "{draft}"\nnum_speculative_tokens = 4\n'
)
RUNS = {
    "varying lengths, V2": (VARYING, "V2"),
    "varying lengths, V1": (VARYING, "V1"),
    "goodput with lookups on the device, V2": (DECIDED, "V2"),
}


@pytest.fixture(scope="module")
def job(demo_pair):
    def make(deployment=None, runner="V2", **options):
        text = None if deployment is None else deployment.format(draft=demo_pair.draft)
        options = {"max_tokens": 12, "max_num_seqs": 16, **options}
        return Job(str(demo_pair.target), PROMPTS, runner=runner, deployment=text, **options)

    return make


@pytest.fixture(scope="module")
def results(generated, job):
    return generated({"alone": job()} | {name: job(*run) for name, run in RUNS.items()})


@pytest.mark.nightly
@pytest.mark.parametrize("name", RUNS)
def test_greedy_answers_are_those_without_speculation(results, name):
    found = results[name]
    assert found["asynchronous"]
    assert len(found["token_ids"]) == 50
    assert found["token_ids"] == results["alone"]["token_ids"]
    totals = found["totals"]["speculation"]
    assert totals["proposed"] == found["proposed"] > 0
    assert totals["accepted"] == found["accepted"]


@pytest.mark.nightly
@pytest.mark.parametrize("deployment", [LOOKUP, HYBRID], ids=["suffix", "hybrid"])
def test_as_much_is_accepted_as_on_the_host(generated, job, deployment):
    """The V2 runner, asynchronous, and the V1 runner, synchronous: accepted draft tokens in the same greedy answers."""
    found = generated(
        {
            "V2": job(deployment, max_tokens=24),
            "V1": job(deployment, "V1", asynchronous=False, max_tokens=24),
        }
    )
    device, host = found["V2"], found["V1"]
    assert device["asynchronous"]
    assert not host["asynchronous"]
    assert device["token_ids"] == host["token_ids"]
    print(f"accepted: {device['accepted']} on the device, {host['accepted']} on the host")
    assert device["accepted"] >= 0.97 * host["accepted"] > 0
