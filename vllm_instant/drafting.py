"""What the scheduler tells the workers about a step's drafts, what they report back, and how drafts are cut.

Engine-independent: ``vllm_instant.seams`` carries plans and reports along with vLLM's own messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_instant.contracts import Draft, DraftPrice

FREE = DraftPrice()


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """How many draft tokens each request may get after this step, and what they cost."""

    lengths: Mapping[str, int] = field(default_factory=dict)
    """By request id; a request that is missing gets the full length."""
    price: DraftPrice = FREE
    pinned: frozenset[str] = frozenset()
    """Requests whose clients asked for their length, whatever it costs."""
    cache_salts: Mapping[str, str] = field(default_factory=dict)
    """By request id, of the requests that have one."""


@dataclass(frozen=True, slots=True)
class DraftReport:
    """What a worker did at the end of a step, where it may have done less than was planned."""

    draft_passes: int
    """Passes of the draft model; 0 when it did not run."""


def worthwhile(
    drafts: Sequence[Sequence[int] | Draft], price: DraftPrice, pinned: Sequence[bool]
) -> list[Sequence[int]]:
    """The drafts without what is not expected to earn its price.

    A token's expected gain is the chance that it and all before it are accepted. Each draft ends before the first
    token whose gain is below ``price.row``; when all that is left would not earn ``price.verifying`` together, there
    are no drafts at all. Drafts without confidence and those of ``pinned`` requests stay as they are.
    """
    chosen: list[Sequence[int]] = []
    surplus, certain, cuttable = 0.0, False, False
    for draft, kept in zip(drafts, pinned, strict=True):
        if not isinstance(draft, Draft):
            chosen.append(draft)
            certain = certain or len(draft) > 0
        elif kept:
            chosen.append(draft.token_ids)
            certain = certain or len(draft.token_ids) > 0
        else:
            reach = np.cumprod(np.asarray(draft.confidence, float))
            worth = int(np.count_nonzero(reach >= price.row)) if len(reach) else 0
            surplus += float(reach[:worth].sum()) - worth * price.row
            chosen.append(draft.token_ids[:worth])
            cuttable = True
    if cuttable and not certain and surplus <= price.verifying and price.verifying > 0:
        return [() for _ in chosen]
    return chosen
