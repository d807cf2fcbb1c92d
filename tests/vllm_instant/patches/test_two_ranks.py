"""Tensor-parallel ranks draft the same, although their sets have orders of their own: otherwise collectives hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK = Path(__file__).resolve().parents[2] / "support" / "rank.py"


@pytest.fixture(scope="module")
def ranks():
    running = [
        subprocess.Popen(
            [sys.executable, str(RANK)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        )
        for seed in (1, 2)
    ]
    answers = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def test_their_sets_have_different_orders(ranks):
    one, other = (rank["order of a set"] for rank in ranks)
    assert one != other
    assert set(one) == set(other)


@pytest.mark.parametrize("drafting", ["suffix", "hybrid", "on the device"])
def test_they_draft_the_same(ranks, drafting):
    one, other = (rank[drafting] for rank in ranks)
    assert any(one)
    assert one == other
