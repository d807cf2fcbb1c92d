"""The number of draft-model steps that gains most for all requests together, each served by its better source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_instant import DraftCost

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Lookups:
    """The lookup's drafts, ``[requests]``; values in accepted tokens."""

    value: Array
    """Expected accepted tokens."""
    gain: Array
    """Expected accepted tokens net of the cost of their rows."""
    rows: npt.NDArray[np.intp]
    """Draft tokens."""


@dataclass(frozen=True, slots=True)
class CatchUp:
    """What the draft model must read before it drafts, ``[requests]``."""

    uncached_tokens: npt.NDArray[np.intp]
    """Tokens that it has not read."""
    steps: Array
    """Steps over which the cost of reading them is spread."""


def best_draft_steps(
    survival: Array,
    lookups: Lookups,
    catch_up: CatchUp,
    row_cost: Array,
    pinned: npt.NDArray[np.bool_],
    draft_cost: DraftCost,
) -> tuple[int, npt.NDArray[np.bool_], npt.NDArray[np.intp], float]:
    """The number of draft steps with the highest total value.

    Args:
        survival: expected value of each token of the draft model, ``[requests, positions]``, falling.
        lookups: the lookup's drafts.
        catch_up: what the model must read first.
        row_cost: cost of one more draft token of each request, ``[requests]``.
        pinned: requests whose clients fixed the draft length, and which are served at any cost, ``[requests]``.
        draft_cost: costs of the step, with ``verify_cost_curve``.

    Returns:
        The draft steps, 0 or more; the requests that the model serves then; their tokens that are worth their rows;
        and the total value.

    """
    num_requests, positions = survival.shape
    earned = np.maximum(survival - row_cost[:, None], 0.0)
    # Value, gain and rows of each request from the draft model, by draft steps from 0: [requests, 1 + positions].
    value, gain, rows = np.zeros((3, num_requests, positions + 1))
    np.cumsum(np.where(earned > 0, survival, 0.0), axis=1, out=value[:, 1:])
    np.cumsum(earned, axis=1, out=gain[:, 1:])
    np.cumsum(earned > 0, axis=1, out=rows[:, 1:])
    reading = np.where(pinned, 0.0, draft_cost.catch_up_per_token * catch_up.uncached_tokens / catch_up.steps)
    gain[:, 1:] -= reading[:, None]
    by_model = gain > lookups.gain[:, None]
    total = np.where(by_model, value - reading[:, None], lookups.value[:, None]).sum(0)
    # The fixed cost of catching up is paid once for all requests, and is spread over the longest of their stretches.
    catches_up = by_model & (catch_up.uncached_tokens > 0)[:, None]
    spread_over = np.where(catches_up, catch_up.steps[:, None], 1.0).max(0)
    total -= draft_cost.catch_up_fixed * catches_up.any(0) / spread_over
    total -= rows_cost(
        draft_cost, np.where(pinned[:, None], 0.0, np.where(by_model, rows, lookups.rows[:, None])).sum(0)
    )
    draft_steps = np.arange(positions + 1)
    total -= np.where(draft_steps > 0, draft_cost.draft_fixed + draft_cost.per_draft_step * draft_steps, 0.0)
    best = int(total.argmax())
    return best, by_model[:, best], (earned > 0).sum(1), float(total[best])


def rows_cost(draft_cost: DraftCost, rows: Array) -> Array:
    """Cost of verifying these total numbers of draft tokens; same shape as ``rows``."""
    counts, costs = np.array([(0, 0.0), *draft_cost.verify_cost_curve]).T
    return np.asarray(np.interp(rows, counts, costs))
