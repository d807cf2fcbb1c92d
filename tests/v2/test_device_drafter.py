"""``suffix`` on the device: vLLM's V2 runner under asynchronous scheduling, beside vLLM alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from v2.generate import Job
from v2.host_syncs import HostSyncs

PROMPTS = [
    "def add(a, b):\n    return a + b\n\ndef add(a, b):\n",
    "one two three four one two three four one two",
    '{"name": "a", "value": 1}, {"name": "b", "value": 2}, {',
    "def main():",
]
DRAFTS = 6
ALWAYS = (
    f'[speculation]\nplugin = "fixed"\nnum_draft_tokens = {DRAFTS}\n'
    f'[drafter]\nplugin = "suffix"\nnum_speculative_tokens = {DRAFTS}\nhistory_tokens = 512\n'
)
BESIDE_A_MODEL = ALWAYS.replace('"suffix"', '"hybrid"\nmodel = "DRAFT"\ndraft_sample_method = "probabilistic"')


@pytest.fixture(scope="module")
def results(generated, demo_pair):
    job = Job(str(demo_pair.target), PROMPTS, max_tokens=14, cache_salt="tenant")
    hybrid = BESIDE_A_MODEL.replace("DRAFT", str(demo_pair.draft))
    return generated(
        {"alone": job, "always": replace(job, deployment=ALWAYS), "hybrid": replace(job, deployment=hybrid)}
    )


@pytest.fixture(scope="module", params=["always", "hybrid"])
def always(request, results):
    return results[request.param]


def test_beside_a_draft_model_both_draft(results):
    found = results["hybrid"]
    assert found["draft_model_calls"] > 0
    assert 0 < found["used_own"] < found["asked_own"]
    assert found["accepted"] >= results["always"]["accepted"]


def test_it_runs_on_the_v2_runner_under_asynchronous_scheduling(always):
    assert "worker.cpu.model_runner" in always["runner"]
    assert always["scheduler"] == "InstantAsyncScheduler"
    assert always["drafter_failures"] == 0


def test_greedy_answers_are_those_without_speculation(results, always):
    assert always["token_ids"] == results["alone"]["token_ids"]


def test_counts_are_the_truth(always):
    totals = always["totals"]["speculation"]
    assert totals["proposed"] == always["proposed"] > totals["accepted"] == always["accepted"] > 0


def test_no_step_waits_for_the_device(always):
    assert always["host_syncs"] == []


def test_syncs_of_a_file_are_recorded():
    tensor = torch.arange(3)
    with HostSyncs(["test_device_drafter"]) as syncs:
        bool(tensor[0] > 0), tensor.tolist(), tensor[[0, 1]], tensor[tensor > 1], tensor.to("cpu"), int(tensor.max())
    assert [call.rpartition(" ")[2] for call in syncs.calls] == [
        "__bool__",
        "tolist",
        "__getitem__",
        "__getitem__",
        "to",
        "__int__",
    ]
    with HostSyncs(["test_device_drafter"]) as syncs:
        tensor + 1, tensor[:2], tensor.to("cpu", non_blocking=True), tensor.clamp_(0, 1)
    assert syncs.calls == []
