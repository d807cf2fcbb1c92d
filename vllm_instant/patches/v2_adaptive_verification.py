"""vLLM's adaptive verification trims only the steps whose drafts the speculation policy lets it trim.

``AdaptiveVerificationManager`` (V2 model runner, ``enable_adaptive_verification``) verifies the draft tokens with the
highest survival probability, as many as its cost curve suggests. In steps that may not be trimmed it is given its
budget: all drafts that were scheduled. Not so where their logits do not fit into one chunk, which only trimming can
prevent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_instant.patches.compat import HasSignature, References, VllmPatch
from vllm_instant.patches.names import PLAN_ATTRIBUTE, V2_ADAPTIVE_VERIFICATION, V2_MODEL_RUNNER
from vllm_instant.speculation.draft_plan import DraftPlan

_MAY_TRIM = "instant_may_trim"


def _execute_model(execute_model: Any, runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    """Tell the manager what the plan allows for this step."""
    manager = runner.adaptive_verification
    if manager is not None:
        plan: DraftPlan | None = getattr(scheduler_output, PLAN_ATTRIBUTE, None)
        setattr(manager, _MAY_TRIM, plan is None or plan.trims_verification)
    return execute_model(scheduler_output, *args, **kwargs)


def _get_num_tokens(
    get_num_tokens: Any, manager: Any, num_tokens_per_req: Mapping[str, int], draft_tokens: Mapping[str, Sequence[int]]
) -> int:
    """Number of tokens that the step computes; the manager keeps the draft budget until the batch is compacted."""
    drafts = {request_id: len(draft_tokens.get(request_id, ())) for request_id in num_tokens_per_req}
    budget = sum(drafts.values())
    fits = budget <= manager._max_total_logits - len(drafts) * manager.num_bonus_tokens
    if getattr(manager, _MAY_TRIM, True) or not fits:
        return int(get_num_tokens(num_tokens_per_req, draft_tokens))
    others = {request_id: number - drafts[request_id] for request_id, number in num_tokens_per_req.items()}
    manager._batch_budget = drafts, others, budget
    return sum(num_tokens_per_req.values())


_FILE, _RUNNER = "v1/worker/gpu/spec_decode/adaptive_verification.py", "v1/worker/gpu/model_runner.py"
_CLASS = "AdaptiveVerificationManager"

PATCH = VllmPatch(
    name="v2_adaptive_verification",
    purpose="vLLM's adaptive verification trims only where the speculation policy lets it",
    requirements=(
        HasSignature(_RUNNER, "GPUModelRunner.execute_model", ("self", "scheduler_output")),
        References(_RUNNER, "GPUModelRunner.__init__", ("adaptive_verification",)),
        HasSignature(_FILE, f"{_CLASS}.get_num_tokens", ("self", "num_tokens_per_req", "draft_tokens"), exact=True),
        References(_FILE, f"{_CLASS}.__init__", ("_max_total_logits", "num_bonus_tokens", "_batch_budget")),
        References(_FILE, f"{_CLASS}.reallocate_drafts", ("_batch_budget",)),
        References(_FILE, f"{_CLASS}.compact_batch", ("_batch_budget",)),
    ),
    slots=("speculation",),
    optional=True,
    wraps={
        f"{V2_MODEL_RUNNER}:GPUModelRunner.execute_model": _execute_model,
        f"{V2_ADAPTIVE_VERIFICATION}:{_CLASS}.get_num_tokens": _get_num_tokens,
    },
)
