"""The example that readers copy: short, correct, and every example deployment file is valid."""

from pathlib import Path

import numpy as np
import pytest

from vllm_instant import DraftRequest, RequestState, UpcomingStep
from vllm_instant.deployment.plugin_manager import plugin_manager
from vllm_instant.deployment.resolved import installed_plugin, plugin_options
from vllm_instant.deployment.settings import resolve
from vllm_instant.testing import check_drafter, check_policy

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.usefixtures("with_test_plugins")


def test_it_is_short():
    assert len((EXAMPLES / "bigram_plugin/bigram_plugin.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_example_files_are_valid(path):
    resolve(path)


def test_it_is_chosen_by_name_like_any_plugin():
    deployment = resolve(EXAMPLES / "bigram.toml")
    assert installed_plugin(deployment, "drafter").distribution == "bigram-plugin"
    assert plugin_options(deployment, "speculation").max_temperature == 0.7


def test_both_keep_their_contracts():
    check_drafter(lambda: _build("drafter", "bigram"))
    check_policy(lambda: _build("speculation", "shy"))


def _build(slot, name, **options):
    plugin = plugin_manager().get(slot, name).plugin
    return plugin.build(plugin.options(**options), None)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 9, 1, 2, 8, 1, 2], [8, 1, 2]),
        ([5, 5, 5], [5]),
        ([1, 2, 3], []),
        ([1, 2], []),
        ([1], []),
    ],
)
def test_the_drafter(tokens, expected):
    request = DraftRequest("r", np.array(tokens, np.int32), 1, 3)
    assert _build("drafter", "bigram").propose([request]) == [expected]


def test_the_policy():
    states = [RequestState("cold", 1, 1, 0.2), RequestState("hot", 1, 1, 1.0)]
    assert _build("speculation", "shy", max_temperature=0.5).get_num_draft_tokens(UpcomingStep(states, 4)) == [4, 0]
