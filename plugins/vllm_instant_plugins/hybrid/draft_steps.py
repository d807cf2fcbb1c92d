"""With how many passes of the draft model all requests together gain most, each from its better source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_instant import DraftCost

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Lookups:
    """What requests get from the lookup; accepted tokens, ``[requests]``."""

    value: Array
    """What its draft is worth."""
    gain: Array
    """What of it is left after its rows are paid."""
    rows: npt.NDArray[np.intp]
    """Its draft tokens."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the draft model has to read before it drafts, ``[requests]``."""

    missed: npt.NDArray[np.intp]
    """Tokens of each request."""
    steps: Array
    """In how many steps that is paid off."""


def best_passes(
    reached: Array,
    own: Lookups,
    reading: Reading,
    row_price: Array,
    pinned: npt.NDArray[np.bool_],
    draft_cost: DraftCost,
) -> tuple[int, npt.NDArray[np.bool_], npt.NDArray[np.intp], float]:
    """The passes that are worth most.

    Args:
        reached: what each token of the draft model is expected to be worth, ``[requests, positions]``, falling.
        own: the lookup's drafts.
        reading: what the model has missed.
        row_price: what one draft token more costs each request, ``[requests]``.
        pinned: whose clients asked for their length, and are served whatever it costs, ``[requests]``.
        draft_cost: of the step, with ``batch``.

    Returns:
        The passes, 0 or more; whom the model serves then; its tokens that are worth their rows; and what all is worth.

    """
    requests, positions = reached.shape
    earned = np.maximum(reached - row_price[:, None], 0.0)
    # [requests, passes]: what each gets and gains from the draft model by passes, from 0 on.
    value, gain, rows = np.zeros((3, requests, positions + 1))
    np.cumsum(np.where(earned > 0, reached, 0.0), axis=1, out=value[:, 1:])
    np.cumsum(earned, axis=1, out=gain[:, 1:])
    np.cumsum(earned > 0, axis=1, out=rows[:, 1:])
    to_read = np.where(pinned, 0.0, draft_cost.catch_up_per_token * reading.missed / reading.steps)
    gain[:, 1:] -= to_read[:, None]
    by_model = gain > own.gain[:, None]
    together = np.where(by_model, value - to_read[:, None], own.value[:, None]).sum(0)
    resumes = by_model & (reading.missed > 0)[:, None]
    together -= draft_cost.catch_up_fixed * resumes.any(0) / np.where(resumes, reading.steps[:, None], 1.0).max(0)
    together -= rows_cost(
        draft_cost, np.where(pinned[:, None], 0.0, np.where(by_model, rows, own.rows[:, None])).sum(0)
    )
    passes = np.arange(positions + 1)
    together -= np.where(passes > 0, draft_cost.draft_fixed + draft_cost.per_draft_step * passes, 0.0)
    best = int(together.argmax())
    return best, by_model[:, best], (earned > 0).sum(1), float(together[best])


def rows_cost(draft_cost: DraftCost, rows: Array) -> Array:
    """What verifying so many draft tokens in all costs; same shape as ``rows``."""
    counts, costs = np.array([(0, 0.0), *draft_cost.verify_cost_curve]).T
    return np.asarray(np.interp(rows, counts, costs))
