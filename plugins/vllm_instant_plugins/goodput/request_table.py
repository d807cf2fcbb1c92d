"""What the policy knows of each live request, in arrays by the request's index, and the requests of a step.

The same requests decode together for many steps, so that what depends only on the list of them is computed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant import RequestState
from vllm_instant.speculation.draft_coverage import MAX_CATCH_UP_TOKENS
from vllm_instant_plugins.jit import compiled

Indices = npt.NDArray[np.intp]
Array = npt.NDArray[np.float64]

_REMEMBERED_BATCHES = 2
"""The requests of the newest plan, and those of the outcomes that arrive in the meantime."""
_RATE_MEMORY = 0.9
MAX_SAVED_STEPS = 8.0
"""Limit of ``RequestTable.saved``, in steps without drafts."""


@dataclass(slots=True, eq=False)
class Batch:
    """Requests that go through a step together."""

    requests: list[RequestState]
    indices: Indices
    fixed_lengths: Indices
    """Draft lengths that clients asked for, ``[requests]``; -1 where the policy decides."""
    adaptive: Indices
    """Positions of the requests whose draft lengths the policy decides."""

    @property
    def all_adaptive(self) -> bool:
        """Whether no client asked for a draft length."""
        return len(self.adaptive) == len(self.requests)


class RequestTable:
    """Context, fixed draft lengths and draft records of the live requests."""

    def __init__(self) -> None:
        self.context: Array = np.zeros(64)
        """Tokens of prompt and answer."""
        self.granted: Array = np.ones(64)
        self.proposed: Array = np.ones(64)
        """Draft tokens that were granted, and delivered by the drafter; older steps fade."""
        self.fixed_lengths: Indices = np.full(64, -1)
        self._entered: Array = np.zeros(64)
        """Newest step when the request entered: older decisions were about an earlier request with this index."""
        self._last_drafted: Array = np.zeros(64)
        self.uncached_tokens: Array = np.zeros(64)
        """Tokens that a draft model must read before it drafts again: it was off when they came."""
        self._reading: Array = np.zeros(64)
        """Tokens that it had to read for the drafts that were granted last."""
        self.saved: Array = np.zeros(64)
        """Seconds that accepted drafts have saved the request, net of what drafts have made its steps longer."""
        self._batches: deque[Batch] = deque(maxlen=_REMEMBERED_BATCHES)

    def enter(self, request: RequestState, newest_step: int, uncached_tokens: float = 0.0) -> None:
        """Add a request that has taken its index; the drafter will not have read ``uncached_tokens`` of it."""
        index = request.index
        if index >= len(self.context):
            self._grow(max(index + 1, 2 * len(self.context)) - len(self.context))
        self.context[index] = request.num_prompt_tokens + request.num_output_tokens
        self.granted[index] = self.proposed[index] = 1.0
        self.fixed_lengths[index] = -1 if request.fixed_num_draft_tokens is None else request.fixed_num_draft_tokens
        self._entered[index] = newest_step
        self._last_drafted[index] = 0.0
        self.uncached_tokens[index] = uncached_tokens
        self._reading[index] = 0.0
        self.saved[index] = 0.0

    def _grow(self, more: int) -> None:
        self.context = np.pad(self.context, (0, more))
        self.granted = np.pad(self.granted, (0, more), constant_values=1.0)
        self.proposed = np.pad(self.proposed, (0, more), constant_values=1.0)
        self.fixed_lengths = np.pad(self.fixed_lengths, (0, more), constant_values=-1)
        self._entered = np.pad(self._entered, (0, more))
        self._last_drafted = np.pad(self._last_drafted, (0, more))
        self.uncached_tokens = np.pad(self.uncached_tokens, (0, more))
        self._reading = np.pad(self._reading, (0, more))
        self.saved = np.pad(self.saved, (0, more))

    def batch(self, requests: Sequence[RequestState]) -> Batch:
        """The batch of this list of requests."""
        listed = requests if isinstance(requests, list) else list(requests)
        for batch in self._batches:
            if batch.requests == listed:  # which compares identities
                return batch
        indices = np.array([request.index for request in listed], np.intp)
        fixed_lengths = self.fixed_lengths[indices]
        batch = Batch(list(listed), indices, fixed_lengths, np.flatnonzero(fixed_lengths < 0))
        self._batches.appendleft(batch)
        return batch

    def calibrate(self, batch: Batch, factor: float, survival: Array) -> tuple[Array, Array, Array | None, float]:
        """Scale ``survival`` in place by how far earlier estimates were accurate; 0 where the client fixed the length.

        Returns:
            The scaled array, the unscaled acceptance of first draft tokens, the share of granted tokens that the
            drafter delivers (None: all; a lookup often finds nothing), and tokens of context over all requests.

        """
        first, rates = np.empty(len(survival)), np.empty(len(survival))
        context, lowest = calibrate_survival(
            batch.indices,
            batch.fixed_lengths,
            factor,
            self.context,
            self.granted,
            self.proposed,
            first,
            rates,
            survival,
        )
        return survival, first, None if lowest > 0.98 else rates, context

    def advance(self, batch: Batch, drafted: Indices, accepted: Indices) -> tuple[float, int, int]:
        """Add a step's tokens; returns the tokens of context that it read, and its drafted and accepted tokens."""
        context, total, num_accepted = advance(batch.indices, drafted, accepted, self.context)
        return context, total, num_accepted

    def save(self, batch: Batch, accepted: Indices, seconds: float, baseline_seconds: float) -> None:
        """Book a step with drafts: what it took, and what the same tokens would have taken without."""
        saved = self.saved[batch.indices] + (1 + accepted) * baseline_seconds - max(seconds, baseline_seconds)
        self.saved[batch.indices] = np.clip(saved, 0.0, MAX_SAVED_STEPS * baseline_seconds)

    def without_recent_drafts(self, batch: Batch, positions: Indices, count: int) -> Indices:
        """The ``count`` of ``positions`` whose requests have gone without drafts for longest."""
        chosen: Indices = positions[np.argsort(self._last_drafted[batch.indices[positions]], kind="stable")[:count]]
        return chosen

    def grant(self, batch: Batch, num_draft_tokens: Indices, step: int) -> tuple[float, int]:
        """Record the drafts of ``step``; returns the tokens that the drafter reads first, and all draft tokens."""
        reading, granted = grant(
            batch.indices, num_draft_tokens, step, self._last_drafted, self.uncached_tokens, self._reading
        )
        return min(reading, float(MAX_CATCH_UP_TOKENS)), granted

    def prompts_unread(self, batch: Batch) -> None:
        """Record that the drafter has read no prompt of the requests without output."""
        for request in batch.requests:
            if not request.num_output_tokens:
                self.uncached_tokens[request.index] = request.num_prompt_tokens

    def drafter_was_off(self, batch: Batch, accepted: Indices) -> None:
        """Record a step in which the drafter did not run and read none of the new tokens."""
        add_uncached(batch.indices, accepted, self.uncached_tokens)

    def drafter_skipped(self, batch: Batch, num_draft_tokens: Indices) -> None:
        """Record a step in which the drafter ran, but not for the requests without draft tokens."""
        add_uncached_where_skipped(batch.indices, num_draft_tokens, self.uncached_tokens)

    def compare(
        self, number: int, planned: Batch, num_draft_tokens: Indices, batch: Batch, drafted: Indices, accepted: Indices
    ) -> tuple[int, int, int]:
        """Compare what the drafter delivered with what step ``number`` granted.

        Args:
            number: step that planned.
            planned: requests that it planned for.
            num_draft_tokens: draft tokens that it granted them.
            batch: requests of the step after it.
            drafted: their draft tokens.
            accepted: accepted ones of these.

        Returns:
            Adaptive requests in ``planned``, those of them that are still the same requests in ``batch``, and accepted
            tokens of the adaptive requests in ``batch``.

        """
        planned_adaptive, known_adaptive, num_accepted = compare_drafts(
            number,
            planned.indices,
            num_draft_tokens,
            batch.indices,
            drafted,
            accepted,
            self._entered,
            self.fixed_lengths,
            self.granted,
            self.proposed,
            self._reading,
            self.uncached_tokens,
        )
        return planned_adaptive, known_adaptive, num_accepted


def to_indices(values: Sequence[int]) -> Indices:
    """Small non-negative integers as an array, in a fraction of the time of ``np.array``."""
    if len(values) > 8 and isinstance(values, list):
        try:
            return np.frombuffer(bytes(values), np.uint8).astype(np.intp)
        except ValueError:
            pass  # one above 255, or below 0
    return np.array(values, np.intp)


# ---------------------------------------------------------------------------------------------------- compiled loops
# One pass over a step's requests each, for which array operations would take many calls. Written arrays come last.


@compiled
def calibrate_survival(
    indices: Any,
    fixed_lengths: Any,
    factor: float,
    context: Any,
    granted: Any,
    proposed: Any,
    first: Any,
    rates: Any,
    survival: Any,
) -> tuple[float, float]:
    """``RequestTable.calibrate``; returns the tokens of context and the lowest delivery rate."""
    tokens, lowest = 0.0, np.inf
    for i in range(len(indices)):
        index = indices[i]
        tokens += context[index]
        rates[i] = proposed[index] / granted[index]
        lowest = min(lowest, rates[i])
        for j in range(survival.shape[1]):
            chance = survival[i, j] if fixed_lengths[i] < 0 else 0.0
            if j == 0:
                first[i] = chance
            survival[i, j] = min(chance * factor, 1.0)
    return tokens, lowest


@compiled
def grant(
    indices: Any, num_draft_tokens: Any, step: int, last_drafted: Any, uncached_tokens: Any, reading: Any
) -> tuple[float, int]:
    """``RequestTable.grant``; returns all tokens that the drafter has not read, and all draft tokens."""
    uncached, granted = 0.0, 0
    for i in range(len(indices)):
        if num_draft_tokens[i] > 0:
            index = indices[i]
            granted += num_draft_tokens[i]
            last_drafted[index] = step
            uncached += uncached_tokens[index]
            reading[index] = uncached_tokens[index]
            uncached_tokens[index] = 0.0
    return uncached, granted


@compiled
def add_uncached(indices: Any, accepted: Any, uncached_tokens: Any) -> None:
    """The drafter has not read the accepted tokens of these requests and the one sampled after them."""
    for i in range(len(indices)):
        uncached_tokens[indices[i]] += accepted[i] + 1


@compiled
def add_uncached_where_skipped(indices: Any, num_draft_tokens: Any, uncached_tokens: Any) -> None:
    """The drafter has not read the new token of each request without draft tokens."""
    for i in range(len(indices)):
        if num_draft_tokens[i] == 0:
            uncached_tokens[indices[i]] += 1


@compiled
def advance(indices: Any, drafted: Any, accepted: Any, context: Any) -> tuple[float, int, int]:
    """``RequestTable.advance``: each request has its accepted tokens and one more."""
    tokens, total, num_accepted = 0.0, 0, 0
    for i in range(len(indices)):
        index = indices[i]
        tokens += context[index]
        context[index] += accepted[i] + 1
        total += drafted[i]
        num_accepted += accepted[i]
    return tokens, total, num_accepted


@compiled
def compare_drafts(
    number: int,
    planned: Any,
    num_draft_tokens: Any,
    indices: Any,
    drafted: Any,
    accepted: Any,
    entered: Any,
    fixed_lengths: Any,
    granted: Any,
    proposed: Any,
    reading: Any,
    uncached_tokens: Any,
) -> tuple[int, int, int]:
    """``RequestTable.compare``."""
    planned_adaptive, known_adaptive, num_accepted = 0, 0, 0
    plan = np.zeros(len(fixed_lengths), np.intp)
    for i in range(len(planned)):
        plan[planned[i]] = num_draft_tokens[i]
        planned_adaptive += fixed_lengths[planned[i]] < 0
    for i in range(len(indices)):
        index = indices[i]
        known = entered[index] < number
        # A drafter may deliver more than was planned when a later plan replaced it: then that is what was asked for.
        asked = max(plan[index], drafted[i]) if known else drafted[i]
        if asked > 0 and drafted[i] == 0 and reading[index] > MAX_CATCH_UP_TOKENS:
            # A draft model reads a long gap over several steps and drafts nothing until it is closed, which says
            # nothing about how much it delivers.
            uncached_tokens[index] += reading[index] - MAX_CATCH_UP_TOKENS
            reading[index] = 0.0
        elif asked > 0:
            # delivery rate = fading sum of delivered / fading sum of granted
            granted[index] = granted[index] * _RATE_MEMORY + asked
            proposed[index] = proposed[index] * _RATE_MEMORY + drafted[i]
        if fixed_lengths[index] < 0:
            known_adaptive += known
            num_accepted += accepted[i]
    return planned_adaptive, known_adaptive, num_accepted
