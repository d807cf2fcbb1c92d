"""The scheduler's plan for a step's drafts, the workers' report on them, and the trimming of drafts.

``vllm_instant.patches`` attaches plans and reports to vLLM's own messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_instant.interfaces.drafter import Draft, PushedTail
from vllm_instant.interfaces.speculation import DraftCost

FREE = DraftCost()


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """The draft budgets after a step, and the cost of drafts."""

    num_draft_tokens: Mapping[str, int] = field(default_factory=dict)
    """Draft budget by request id; a request that is missing gets the maximum."""
    draft_cost: DraftCost = FREE
    fixed: frozenset[str] = frozenset()
    """Ids of requests whose clients fixed the number of draft tokens, so that the cost of drafts is ignored."""
    cache_salts: Mapping[str, str] = field(default_factory=dict)
    """Cache salt by request id, without the requests that have none."""
    draft_model_runs: bool = True
    """False where a draft model must not run, because a request waits for its first token."""
    pushed: Mapping[str, Sequence[PushedTail]] = field(default_factory=dict)
    """Drafts that clients sent for their own requests since the last step, by request id."""
    trims_verification: bool = True
    """Whether vLLM's adaptive verification may trim the drafts that this step verifies (granted by an earlier plan)."""


@dataclass(frozen=True, slots=True)
class DraftReport:
    """What a worker drafted since its last report."""

    draft_steps: int | None = None
    """Number of steps of the draft model, where it may run fewer than planned; None where it follows the plan."""
    uncached_tokens: int | None = None
    """Number of tokens that the draft model prefilled first, because it was skipped when they were computed."""
    failures: Sequence[Mapping[str, Any]] = ()
    """Failures of the drafter plugin so far (``circuit_breaker.failure_counts``)."""


def trim_drafts(
    drafts: Sequence[Sequence[int] | Draft], draft_cost: DraftCost, fixed: Sequence[bool]
) -> list[Sequence[int]]:
    """Return the drafts without the tokens whose expected gain is below the cost of their verification.

    A token's expected gain is its survival: the probability that it and all tokens before it are accepted, the product
    of their confidences. With the tokens of all requests sorted by survival ``s_1 >= s_2 >= ...``, the first ``n`` are
    kept where ``n`` maximizes ``s_1 + ... + s_n - cost(n)``, with the cost interpolated in ``verify_cost_curve``.

    Args:
        drafts: One draft per request; drafts without confidence are kept whole.
        draft_cost: Cost of drafts; without a ``verify_cost_curve`` nothing is trimmed.
        fixed: Per request, whether its draft is kept whole.

    """
    trimmed = [draft.token_ids if isinstance(draft, Draft) else draft for draft in drafts]
    if not draft_cost.verify_cost_curve:
        return trimmed
    rows = [
        row
        for row, (draft, is_fixed) in enumerate(zip(drafts, fixed, strict=True))
        if isinstance(draft, Draft) and len(draft.token_ids) and not is_fixed
    ]
    if not rows:
        return trimmed
    survival = [np.cumprod(np.asarray(drafts[row].confidence, float)) for row in rows]  # type: ignore[union-attr]
    all_survival = np.concatenate(survival)
    descending = np.sort(all_survival)[::-1]
    # Drafts that are kept whole are verified in any case: the cost curve starts after them.
    num_whole = sum(map(len, trimmed)) - len(all_survival)
    numbers, costs = np.array([(0, 0.0), *draft_cost.verify_cost_curve]).T
    cost = np.interp(num_whole + np.arange(len(descending) + 1.0), numbers, costs)
    value = np.concatenate([[0.0], np.cumsum(descending)]) - cost
    num_kept = int(value.argmax())  # the smallest of equal maxima
    threshold = descending[num_kept - 1] if num_kept else np.inf
    # Of the tokens at the threshold only this many are kept, those of the first requests.
    num_ties = num_kept - int(np.count_nonzero(all_survival > threshold))
    for row, chances in zip(rows, survival, strict=True):
        above = int(np.count_nonzero(chances > threshold))
        ties = min(num_ties, int(np.count_nonzero(chances == threshold)))
        num_ties -= ties
        trimmed[row] = trimmed[row][: above + ties]
    return trimmed
