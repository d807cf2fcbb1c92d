"""What the scheduler tells the workers about a step's drafts, what they report back, and how drafts are cut.

Engine-independent: ``vllm_instant.patches`` carries plans and reports along with vLLM's own messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_instant.interfaces.drafter import Draft
from vllm_instant.interfaces.speculation import DraftCost

FREE = DraftCost()


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """How many draft tokens each request may get after this step, and what they cost."""

    num_draft_tokens: Mapping[str, int] = field(default_factory=dict)
    """By request id; a request that is missing gets the full length."""
    draft_cost: DraftCost = FREE
    fixed: frozenset[str] = frozenset()
    """Requests whose clients asked for their length, whatever it costs."""
    cache_salts: Mapping[str, str] = field(default_factory=dict)
    """By request id, of the requests that have one."""


@dataclass(frozen=True, slots=True)
class DraftReport:
    """What a worker says about its drafting since the last report."""

    draft_steps: int | None = None
    """Passes of the draft model, where it may do less than was planned; None where the plan says it all."""
    uncached_tokens: int | None = None
    """Tokens that the draft model read first, because they came while it did not run."""
    failures: Sequence[Mapping[str, Any]] = ()
    """Failures of its drafter plugin so far, see ``containment.failure_counts``."""


def trim_drafts(
    drafts: Sequence[Sequence[int] | Draft], draft_cost: DraftCost, pinned: Sequence[bool]
) -> list[Sequence[int]]:
    """The drafts without what is not expected to earn its price.

    A token brings the chance that it and all before it are accepted. The likeliest tokens of all requests are kept, as
    many as bring most after ``price.batch`` is paid, and none where none do. Drafts without confidence and those of
    ``pinned`` requests stay as they are, and the others are verified beside them.
    """
    whole = [draft.token_ids if isinstance(draft, Draft) else draft for draft in drafts]
    if not draft_cost.verify_cost_curve:
        return whole
    cuttable = [
        row
        for row, (draft, kept) in enumerate(zip(drafts, pinned, strict=True))
        if isinstance(draft, Draft) and len(draft.token_ids) and not kept
    ]
    if not cuttable:
        return whole
    reach = [np.cumprod(np.asarray(drafts[row].confidence, float)) for row in cuttable]  # type: ignore[union-attr]
    together = np.concatenate(reach)
    falling = np.sort(together)[::-1]
    already = sum(map(len, whole)) - len(together)
    counts, costs = np.array([(0, 0.0), *draft_cost.verify_cost_curve]).T
    cost = np.interp(already + np.arange(len(falling) + 1.0), counts, costs)
    earned = np.concatenate([[0.0], np.cumsum(falling)]) - cost
    best = int(earned.argmax())  # the fewest of equals
    least = falling[best - 1] if best else np.inf
    preemption_order = best - int(np.count_nonzero(together > least))
    for row, chances in zip(cuttable, reach, strict=True):
        kept = int(np.count_nonzero(chances > least))
        # Of equally likely tokens those of the first requests are kept.
        equal = min(preemption_order, int(np.count_nonzero(chances == least)))
        preemption_order -= equal
        whole[row] = whole[row][: kept + equal]
    return whole
