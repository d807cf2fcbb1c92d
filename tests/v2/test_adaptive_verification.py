"""vLLM's ``AdaptiveVerificationManager`` verifies all that was scheduled where the policy does not let it trim."""

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_instant.patches.names import PLAN_ATTRIBUTE
from vllm_instant.patches.v2_adaptive_verification import PATCH
from vllm_instant.speculation.draft_plan import DraftPlan

adaptive_verification = pytest.importorskip("vllm.v1.worker.gpu.spec_decode.adaptive_verification")
pytestmark = pytest.mark.v2

EXECUTE, NUM_TOKENS = PATCH.wraps.values()
SCHEDULED = {"a": 4, "b": 3, "c": 1}
DRAFTS = {"a": [1, 2, 3], "b": [1, 2]}


def _manager(max_total_logits=100):
    """The real manager as far as the host's part goes; its confidence in every draft token is 1 %."""
    manager = adaptive_verification.AdaptiveVerificationManager.__new__(
        adaptive_verification.AdaptiveVerificationManager
    )
    manager.num_speculative_steps, manager.num_bonus_tokens = 3, 1
    manager._max_total_logits = max_total_logits
    manager._batch_budget = None
    manager._stale_idx = 0
    manager._stale_confidences = [SimpleNamespace(np=np.full((3, 3), 0.01))]
    manager.cost_tables = np.zeros(4), np.linspace(1.0, 2.0, 16)
    manager.req_states = SimpleNamespace(
        req_id_to_index={"a": 0, "b": 1, "c": 2},
        num_computed_tokens_np=np.full(3, 10),
        prefill_len=SimpleNamespace(np=np.full(3, 8)),
    )
    return manager


def _step(manager, plan):
    output = SimpleNamespace()
    if plan is not None:
        setattr(output, PLAN_ATTRIBUTE, plan)

    def execute(scheduler_output):
        assert scheduler_output is output
        total = NUM_TOKENS(manager.get_num_tokens, manager, SCHEDULED, DRAFTS)
        drafts, scheduled = np.array([3, 2, 0]), np.array([4, 3, 1])
        tokens, _ = manager.compact_batch(drafts, scheduled, np.array([0, 4, 7, 8]))
        return total, tokens.tolist()

    return EXECUTE(execute, SimpleNamespace(adaptive_verification=manager), output)


@pytest.mark.parametrize("plan", [None, DraftPlan(trims_verification=True)])
def test_where_it_may_trim_vllm_decides(plan):
    assert _step(_manager(), plan) == (3, [1, 1, 1])


def test_where_it_may_not_everything_is_verified():
    assert _step(_manager(), DraftPlan(trims_verification=False)) == (8, [4, 3, 1])


def test_each_step_has_a_plan_of_its_own():
    manager = _manager()
    for may_trim in (True, False, True):
        assert _step(manager, DraftPlan(trims_verification=may_trim))[0] == (3 if may_trim else 8)


def test_drafts_whose_logits_do_not_fit_into_one_chunk_are_trimmed_all_the_same():
    assert _step(_manager(max_total_logits=7), DraftPlan(trims_verification=False)) == (3, [1, 1, 1])
    assert _step(_manager(max_total_logits=8), DraftPlan(trims_verification=False)) == (8, [4, 3, 1])


def test_a_runner_without_adaptive_verification_is_left_alone():
    runner, output = SimpleNamespace(adaptive_verification=None), object()
    assert EXECUTE(lambda given, *args: (given, args), runner, output, 1) == (output, (1,))
