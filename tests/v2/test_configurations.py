"""What vLLM would choose on H100 GPUs for each deployment, beside a table that is kept for each vLLM version.

A row that changes is a decision to review. To accept it, write the printed table into the file.
"""

import json
from pathlib import Path

import pytest
from vllm_releases import NEWEST, OLDEST

BASE = Path(__file__).parents[2] / "examples/demo_models/base"
TABLES = Path(__file__).parent / "configurations"


@pytest.fixture(scope="module", params=[OLDEST, NEWEST])
def chosen(request, program, newest_release):
    sources = None if request.param == OLDEST else newest_release.parent
    return request.param, program("configurations", str(BASE), str(BASE), first_path=sources)


def test_every_choice_is_the_recorded_one(chosen):
    version, found = chosen
    recorded = json.loads((TABLES / f"{version}.json").read_text())
    assert found == recorded, json.dumps(found, indent=1)


def test_without_a_drafter_the_choices_are_vllms_own(chosen):
    _, found = chosen
    for parallel in ("1 GPU", "TP 2", "DP 2", "PP 2"):
        own = found[f"vLLM alone: no speculation, {parallel}"]
        assert found[f"speculation off, {parallel}"] == own


def test_a_draft_model_keeps_vllms_runner_and_scheduling(chosen):
    _, found = chosen
    assert found["model, 1 GPU"].startswith("V2, async, FULL_AND_PIECEWISE")


def test_a_draft_model_gets_graphs_of_every_tier_but_with_data_parallelism(chosen):
    """VLLM withdraws the table there."""
    _, found = chosen
    for parallel in ("1 GPU", "TP 2", "PP 2"):
        assert "graphs of 0 1 2 4 drafts" in found[f"model, {parallel}"]
    assert "graphs of 4 drafts; speculation limited" in found["model, DP 2"]


def test_what_will_not_start_is_refused_beforehand(chosen):
    _, found = chosen
    assert "rejection_sampler refused" in found["model, relaxed sampler, 1 GPU"]


def test_a_hybrid_drafter_gets_the_v2_runner_with_a_limit(chosen):
    _, found = chosen
    assert found["hybrid, 1 GPU"].startswith("V2, async")
    assert "drafter limited" in found["hybrid, 1 GPU"]


def test_lookups_are_drafted_on_the_device_without_a_limit(chosen):
    _, found = chosen
    assert found["suffix, 1 GPU"].startswith("V2, async, FULL_AND_PIECEWISE, ngram_gpu, scheduled lengths")
    assert "drafter limited" not in found["suffix, 1 GPU"]
