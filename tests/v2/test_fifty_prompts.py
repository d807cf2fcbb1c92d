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
RUNS = {
    "varying lengths, V2": (VARYING, "V2"),
    "varying lengths, V1": (VARYING, "V1"),
    "goodput with lookups on the device, V2": (DECIDED, "V2"),
}


@pytest.fixture(scope="module")
def results(generated, demo_pair):
    def job(deployment=None, runner="V2"):
        text = None if deployment is None else deployment.format(draft=demo_pair.draft)
        return Job(str(demo_pair.target), PROMPTS, runner=runner, deployment=text, max_tokens=12, max_num_seqs=16)

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
