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
from vllm_instant_plugins.goodput.plan_kernels import LEVELS, best_plan

Array = npt.NDArray[np.float64]


_EVEN: Array = np.ones(0)
"""Weights or yields that are 1 for all."""
_NO_DRAFTING: Array = np.zeros(4)


@dataclass(slots=True)  # not frozen, which would take longer to make
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
    def return_on_drafts(self) -> float:
        """Expected accepted tokens relative to what their time would bring without drafts."""
        extra = self.seconds - self.off_seconds
        accepted = self.tokens - self.requests
        return accepted * self.off_seconds / (extra * self.requests) if extra > 0 else np.inf

    @property
    def draft_tokens(self) -> int:
        """Draft tokens granted in total."""
        return int(self.lengths.sum())


def max_step(choice: Choice, reach: Array, yields: Array | None, slowest: float) -> float:
    """Seconds of a step beyond which its drafts slow some request down to less than ``slowest`` of its speed without.

    Args:
        choice: the plan.
        reach: as for ``choose``.
        yields: as for ``choose``.
        slowest: 0..1, 0 excluded.

    """
    drafted = np.arange(reach.shape[1]) < choice.lengths[:, None]
    accepted = np.where(drafted, reach, 0.0).sum(1)
    least = 1.0 + float((accepted if yields is None else accepted * yields).min())
    return least * choice.off_seconds / slowest


def choose(
    reach: Array,
    costs: StepCosts,
    context: float,
    *,
    max_rows: float,
    max_seconds: float = np.inf,
    weights: Array | None = None,
    yields: Array | None = None,
    must_draft: bool = False,
    more_rows: float = 0.0,
    sigmas: float = 0.0,
    drafting_counts: bool = True,
) -> Choice:
    """The plan with the most expected tokens a second, which may be to draft nothing.

    Args:
        reach: chance that draft token j of request i is reached and accepted, ``[requests, positions]``, falling in j.
        costs: what steps cost here.
        context: tokens of context over all requests.
        max_rows: plans with more rows than this are not considered.
        max_seconds: plans that take longer are not considered unless drafting nothing does, too.
        weights: what a token of each request is worth, ``[requests]``; 1 by default.
        yields: share of the granted draft tokens that the drafter delivers, ``[requests]``; 1 by default.
        must_draft: the best plan that drafts anything, if the limits allow one.
        more_rows: rows that the step has in any case, beside one a request.
        drafting_counts: False where the drafter itself weighs what its passes cost.
        sigmas: believe that steps with drafts cost this many standard deviations less than estimated.

    """
    requests = len(reach)
    context_seconds = costs.context_seconds(context)
    off_at_knots, at_knots = costs.at_knots(), costs.at_knots(sigmas)
    if costs.experts.counted:
        # Drafts share experts with the token before them, other requests do not: rows alone do not say what they cost.
        of_experts = costs.expert_seconds(costs.knots, requests)
        off_at_knots, at_knots = off_at_knots + of_experts, at_knots + of_experts
    lengths = np.empty(requests, np.intp)
    passes, lowest, tokens, seconds, off_seconds = best_plan(
        reach,
        _EVEN if weights is None else weights,
        _EVEN if yields is None else yields,
        costs.knots,
        at_knots,
        off_at_knots,
        context_seconds,
        costs.verifying_seconds(),
        costs.drafting_weights() if drafting_counts else _NO_DRAFTING,
        float(more_rows),
        float(max_rows),
        float(max_seconds),
        must_draft,
        lengths,
    )
    if weights is not None:
        tokens = float(reach[np.arange(reach.shape[1]) < lengths[:, None]].sum())
    return Choice(
        lengths,
        passes,
        requests + tokens,
        seconds,
        off_seconds,
        requests,
        (lowest / LEVELS) ** 2 if passes else 1.0,
    )
