"""What the policy keeps of each live request, in arrays by the request's index, and the requests of a step.

The same requests decode together for many steps, so that what follows from a list of them is worked out once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_instant import RequestState
from vllm_instant_plugins.goodput.request_kernels import advance, compare_drafts

Indices = npt.NDArray[np.intp]
Array = npt.NDArray[np.float64]

_REMEMBERED_BATCHES = 2
"""The newest plan's requests, and those of the outcomes that arrive meanwhile."""


@dataclass(slots=True, eq=False)
class Batch:
    """Requests that go through a step together."""

    requests: list[RequestState]
    indices: Indices
    pins: Indices
    """Draft lengths that clients asked for, ``[requests]``; -1 where the policy decides."""
    free: Indices
    """Positions of the requests whose lengths are the policy's to choose."""

    @property
    def all_free(self) -> bool:
        """Whether no client asked for a length."""
        return len(self.free) == len(self.requests)


class RequestTable:
    """Context, pins and drafting records of the live requests."""

    def __init__(self) -> None:
        self.context: Array = np.zeros(64)
        """Tokens of prompt and answer."""
        self.granted: Array = np.ones(64)
        self.proposed: Array = np.ones(64)
        """Draft tokens that were granted and that the drafter delivered, recently."""
        self.pins: Indices = np.full(64, -1)
        self._entered: Array = np.zeros(64)
        """Number of the newest step when the request came: older decisions were about another one."""
        self._batches: deque[Batch] = deque(maxlen=_REMEMBERED_BATCHES)

    def enter(self, request: RequestState, newest_step: int) -> None:
        """A request took its index."""
        index = request.index
        if index >= len(self.context):
            more = max(index + 1, 2 * len(self.context)) - len(self.context)
            self.context = np.pad(self.context, (0, more))
            self.granted = np.pad(self.granted, (0, more), constant_values=1.0)
            self.proposed = np.pad(self.proposed, (0, more), constant_values=1.0)
            self.pins = np.pad(self.pins, (0, more), constant_values=-1)
            self._entered = np.pad(self._entered, (0, more))
        self.context[index] = request.num_prompt_tokens + request.num_output_tokens
        self.granted[index] = self.proposed[index] = 1.0
        self.pins[index] = -1 if request.fixed_num_draft_tokens is None else request.fixed_num_draft_tokens
        self._entered[index] = newest_step

    def batch(self, requests: Sequence[RequestState]) -> Batch:
        """What is known of this list of requests."""
        listed = requests if isinstance(requests, list) else list(requests)
        for batch in self._batches:
            if batch.requests == listed:  # which compares identities
                return batch
        indices = np.array([request.index for request in listed], np.intp)
        pins = self.pins[indices]
        batch = Batch(list(listed), indices, pins, np.flatnonzero(pins < 0))
        self._batches.appendleft(batch)
        return batch

    def advance(self, batch: Batch, drafted: Indices, accepted: Indices) -> tuple[float, int, int]:
        """A step is over; returns the tokens of context that it read, and its drafted and accepted tokens."""
        context, total, kept = advance(batch.indices, drafted, accepted, self.context)
        return context, total, kept

    def compare(
        self, number: int, planned: Batch, lengths: Indices, batch: Batch, drafted: Indices, accepted: Indices
    ) -> tuple[int, int, int]:
        """Set what the drafter delivered beside what step ``number`` granted.

        Args:
            number: of the step that planned.
            planned: the requests that it planned for.
            lengths: draft tokens that it granted them.
            batch: the requests of the step after it.
            drafted: their draft tokens.
            accepted: those that were accepted.

        Returns:
            How many of ``planned`` no client decided about, how many of these are still the same requests in ``batch``,
            and what was accepted of those in ``batch`` that no client decided about.

        """
        planned_free, known_free, kept = compare_drafts(
            number,
            planned.indices,
            lengths,
            batch.indices,
            drafted,
            accepted,
            self._entered,
            self.pins,
            self.granted,
            self.proposed,
        )
        return planned_free, known_free, kept


def whole_numbers(values: Sequence[int]) -> Indices:
    """Small whole numbers as an array, in a fraction of the time that ``np.array`` takes."""
    if len(values) > 8 and isinstance(values, list):
        try:
            return np.frombuffer(bytes(values), np.uint8).astype(np.intp)
        except ValueError:
            pass  # one above 255, or below 0
    return np.array(values, np.intp)
