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


@pytest.mark.xfail(reason="hybrid wraps the V1 runner only, yet its method makes vLLM choose V2", strict=True)
def test_hybrid_is_served_by_a_runner_that_it_wraps(chosen):
    _, found = chosen
    assert found["hybrid, 1 GPU"].startswith("V1")
