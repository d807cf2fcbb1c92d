"""Which draft lengths give the most accepted tokens a second.

A step with ``n`` requests yields ``n`` tokens and, for each draft token, the chance that it is reached and accepted;
it takes the time that ``StepCosts`` estimates. The best draft tokens are always the most likely ones, so that a plan
is two numbers: how many tokens the drafter makes at most, and how likely a token must be to be worth its row. All pairs
of these are tried at once (the chances sorted into a histogram), because the cost curve has steps and a search that
walks uphill would stop at the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.goodput.costs import StepCosts

Array = npt.NDArray[np.float64]

LEVELS = 48
"""Thresholds that are tried, denser near zero, where the tokens of small batches on large devices are worth it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan for one step and what is expected of it; tokens and seconds are per step."""

    lengths: npt.NDArray[np.intp]
    """Draft length by request."""
    passes: int
    tokens: float
    seconds: float
    off_seconds: float
    requests: int
    threshold: float
    """Chance of acceptance from which a draft token was worth its row."""

    @property
    def gain(self) -> float:
        """Expected tokens a second relative to no drafting."""
        return self.tokens / self.seconds * self.off_seconds / self.requests

    @property
    def draft_tokens(self) -> int:
        """Draft tokens granted in total."""
        return int(self.lengths.sum())


def choose(
    reach: Array,
    costs: StepCosts,
    context: float,
    *,
    most_rows: float,
    most_seconds: float = np.inf,
    weights: Array | None = None,
    yields: Array | None = None,
    must_draft: bool = False,
    more_rows: float = 0.0,
    sigmas: float = 0.0,
) -> Choice:
    """The plan with the most expected tokens a second, which may be to draft nothing.

    Args:
        reach: chance that draft token j of request i is reached and accepted, ``[requests, positions]``, falling in j.
        costs: what steps cost here.
        context: tokens of context over all requests.
        most_rows: plans with more rows than this are not considered.
        most_seconds: plans that take longer are not considered unless drafting nothing does, too.
        weights: what a token of each request is worth, ``[requests]``; 1 by default.
        yields: share of the granted draft tokens that the drafter delivers, ``[requests]``; 1 by default.
        must_draft: the best plan that drafts anything, if the limits allow one.
        more_rows: rows that the step has in any case, beside one a request.
        sigmas: believe that steps with drafts cost this many standard deviations less than estimated.

    """
    requests, positions = reach.shape
    value = reach if weights is None else reach * weights[:, None]
    gained = value if yields is None else value * yields[:, None]
    level = np.minimum(np.sqrt(value) * LEVELS, LEVELS - 1).astype(np.intp)
    cell = level + np.arange(0, positions * LEVELS, LEVELS)
    flat = cell.ravel()
    size = positions * LEVELS
    rows_of = np.bincount(flat, None if yields is None else np.repeat(yields, positions), minlength=size)
    tokens_of = np.bincount(flat, gained.ravel(), minlength=size)
    # [positions + 1, LEVELS]: what drafting so many tokens, of at least this level, adds.
    plans = (positions + 1, LEVELS)
    rows, tokens = np.zeros(plans), np.zeros(plans)
    rows[1:] = rows_of.reshape(positions, LEVELS)[:, ::-1].cumsum(1)[:, ::-1].cumsum(0)
    tokens[1:] = tokens_of.reshape(positions, LEVELS)[:, ::-1].cumsum(1)[:, ::-1].cumsum(0)

    all_rows = rows + requests + more_rows
    passes = np.arange(positions + 1.0)[:, None]
    seconds = costs.target_seconds(all_rows, context, sigmas)
    off_seconds = float(costs.target_seconds(all_rows[0, :1], context)[0])
    seconds[0] = off_seconds
    seconds += (rows > 0) * costs.verifying_seconds() + costs.drafting_seconds(passes, all_rows, requests)
    base = float(requests) if weights is None else float(weights.sum())
    rate = (base + tokens) / seconds
    rate[(all_rows > most_rows) | (seconds > max(most_seconds, off_seconds))] = 0.0
    rate[0] = base / off_seconds
    if must_draft:
        rate[rows == 0] = 0.0
    best = int(rate.argmax())  # the first of equals: the fewest passes
    drafted, lowest = divmod(best, LEVELS)
    lengths = (level[:, :drafted] >= lowest).sum(1)
    plain = (
        tokens[drafted, lowest] if weights is None else float(reach[:, :drafted][level[:, :drafted] >= lowest].sum())
    )
    return Choice(
        lengths,
        drafted,
        requests + float(plain),
        float(seconds[drafted, lowest]) if drafted else off_seconds,
        off_seconds,
        requests,
        (lowest / LEVELS) ** 2 if drafted else 1.0,
    )
