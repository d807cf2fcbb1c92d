"""Whose drafts serve each request: a lookup's or a draft model's, decided on the device.

One launch per step, one program per request. The acceptance of the model's tokens is an average of its row, in which
older steps fade; the host learns nothing of it, so that nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PRIOR_TOKENS = 4.0
"""Tokens that what is assumed of each source counts as."""
MEMORY = tl.constexpr(0.97)
"""What a step leaves of the earlier ones."""
TRIED = tl.constexpr(0)
KEPT = tl.constexpr(1)
PREDICTED = tl.constexpr(2)
FOUND = tl.constexpr(3)
LAST = tl.constexpr(4)
NUM_STATE = tl.constexpr(5)
"""A row's numbers: the model's tokens that were compared, and how many of them were accepted; the accepted tokens that
the lookup expected, and how many there were; and what it expected of the last drafts, if these were its own, otherwise
-1."""


@triton.jit
def choose(
    rows_ptr,
    num_sampled_ptr,
    num_rejected_ptr,
    expected_ptr,
    state_ptr,
    chosen_ptr,
    num_drafts: tl.constexpr,
):
    """Learn from the last drafts of a request and choose its next ones."""
    request = tl.program_id(0)
    row = tl.load(rows_ptr + request)
    state = state_ptr + row * NUM_STATE
    accepted = tl.maximum(tl.load(num_sampled_ptr + request) - 1, 0).to(tl.float32)
    # Of the tokens behind a rejected one nothing is known.
    refused = tl.minimum(tl.load(num_rejected_ptr + request), 1).to(tl.float32)
    last = tl.load(state + LAST)
    by_model = tl.where(last < 0.0, 1.0, 0.0)
    by_lookup = (1.0 - by_model) * tl.minimum(accepted + refused, 1.0)
    tried = MEMORY * tl.load(state + TRIED) + by_model * (accepted + refused)
    kept = MEMORY * tl.load(state + KEPT) + by_model * accepted
    predicted = MEMORY * tl.load(state + PREDICTED) + by_lookup * last
    found = MEMORY * tl.load(state + FOUND) + by_lookup * accepted
    acceptance = kept / tried
    survival = 1.0
    expected_of_model = 0.0
    for _ in range(num_drafts):
        survival *= acceptance
        expected_of_model += survival
    expected = tl.load(expected_ptr + request)
    chosen = expected * found / predicted > expected_of_model
    tl.store(state + TRIED, tried)
    tl.store(state + KEPT, kept)
    tl.store(state + PREDICTED, predicted)
    tl.store(state + FOUND, found)
    tl.store(state + LAST, tl.where(chosen, expected, -1.0))
    tl.store(chosen_ptr + request, chosen.to(tl.int8))


class DraftSource:
    """Chooses between a lookup and a draft model.

    Args:
        max_num_seqs: Number of rows.
        num_drafts: Number of draft tokens of both.
        acceptance: Assumed probability that a token of the model is accepted if those before it are.
        device: Device of all tensors.

    """

    def __init__(self, max_num_seqs: int, num_drafts: int, acceptance: float, device: torch.device | str) -> None:
        self._num_drafts = num_drafts
        self._new = PRIOR_TOKENS * torch.tensor([1.0, acceptance, 1.0, 1.0, 0.0], device=device)
        self._state = self._new.repeat(max_num_seqs, 1)
        """float32 ``[max_num_seqs, NUM_STATE]``."""
        self._chosen = torch.zeros(max_num_seqs, dtype=torch.int8, device=device)

    def prefers_lookup(
        self, rows: torch.Tensor, num_sampled: torch.Tensor, num_rejected: torch.Tensor, expected: torch.Tensor
    ) -> torch.Tensor:
        """Whose drafts are to be verified: bool ``[requests]``, True for the lookup's.

        Args:
            rows: int64 ``[requests]``.
            num_sampled: int32 ``[requests]``: tokens that each request sampled in this step.
            num_rejected: int32 ``[requests]``: its draft tokens that were rejected in this step.
            expected: float32 ``[requests]``: accepted tokens that the lookup expects of its drafts.

        """
        choose[(len(rows),)](
            rows, num_sampled, num_rejected, expected, self._state, self._chosen, num_drafts=self._num_drafts
        )
        return self._chosen[: len(rows)].bool()

    def forget(self, row: int) -> None:
        """Another request takes this row; both sources are assumed to be for it what they were for all rows lately."""
        tried, kept, predicted, found, _ = self._state.sum(0)
        self._state[row].copy_(self._new)
        self._state[row, KEPT.value] = PRIOR_TOKENS * kept / tried
        self._state[row, FOUND.value] = PRIOR_TOKENS * found / predicted
