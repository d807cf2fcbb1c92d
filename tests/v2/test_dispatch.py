"""Which CUDA graphs would run the steps that are planned, by the dispatchers of both model runners."""

import json
from pathlib import Path

import pytest

RECORDED = Path(__file__).parent / "dispatch.json"
FULL_SHARE = 0.95
MAX_REGRET = 0.03


@pytest.fixture(scope="module")
def dispatched(program):
    return program("dispatch")


def test_steps_are_dispatched_as_recorded(dispatched):
    assert dispatched["steps"] == json.loads(RECORDED.read_text()), json.dumps(dispatched["steps"], indent=1)


def test_the_policys_plans_run_in_full_graphs(dispatched):
    assert min(dispatched["full_share"]["V2"].values()) >= FULL_SHARE, dispatched["full_share"]


def test_the_policy_is_nearly_as_fast_as_the_best_fixed_length_where_pieces_take_longer(dispatched):
    assert max(dispatched["regret"].values()) <= MAX_REGRET, dispatched["regret"]
