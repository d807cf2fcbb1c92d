"""Lookup of the newest tokens among earlier ones, on the device and without synchronisation with the host.

Earlier occurrences of the newest tokens vote on what follows (``suffix_vote``). The tokens are a request's own and
those of a ring of outputs of requests that have ended, where each token has the number of its group and only
occurrences in the request's group count; ``append_output`` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_instant_kernels.suffix_vote import MAX_CANDIDATES, NUM_STATE, ORDERS, find, vote

END = -1
"""Marks the end of an output in the ring."""
MAX_BLOCKS = 256
"""Blocks of positions that one program adds up."""
NO_GROUP = -1
"""Group of a request that does not search the ring."""


@triton.jit(do_not_specialize=["row", "num_prompt_tokens", "group", "capacity"])
def _append(
    tokens_ptr,
    groups_ptr,
    stop_ptr,
    own_ptr,
    num_tokens_ptr,
    own_stride,
    row,
    num_prompt_tokens,
    group,
    capacity,
    BLOCK: tl.constexpr,
):
    """Grid ``[1]``: copies a row's output, the newest ``capacity - 1`` tokens at most, and ``END`` behind it."""
    end = tl.load(num_tokens_ptr + row).to(tl.int64)
    begin = tl.maximum(end - capacity + 1, num_prompt_tokens)
    count = tl.maximum(end - begin, 0)
    num_written = tl.where(count > 0, count + 1, 0)
    stop = tl.load(stop_ptr)
    source = own_ptr + row.to(tl.int64) * own_stride + begin
    lane = tl.arange(0, BLOCK)
    for start in range(0, num_written, BLOCK):
        at = start + lane
        token = tl.load(source + at, mask=at < count, other=-1)
        slot = (stop + at) % capacity
        tl.store(tokens_ptr + slot, token, mask=at < num_written)
        tl.store(groups_ptr + slot, group, mask=at < num_written)
    tl.debug_barrier()
    tl.store(stop_ptr, stop + num_written)


@dataclass(frozen=True, slots=True)
class LookupBatch:
    """The requests of a step; all tensors are on the device."""

    token_ids: torch.Tensor
    """int32 ``[max_num_seqs, max_model_len]``: prompts and outputs, by row."""
    num_tokens: torch.Tensor
    """int32 ``[max_num_seqs]``: tokens of each row."""
    rows: torch.Tensor
    """int64 ``[requests]``: the row of each request."""
    num_sampled: torch.Tensor
    """int32 ``[requests]``: tokens that each request sampled in this step; without one there is no lookup."""
    max_num_tokens: int
    """An upper bound of ``num_tokens`` of these requests."""


class _Found:
    """Workspace of ``find``: the newest occurrences of every block.

    Args:
        max_num_seqs: Maximum number of requests.
        max_blocks: Maximum number of blocks of positions.
        device: Device of the tensors.

    """

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device | str) -> None:
        self.max_blocks = max_blocks
        cells = (max_num_seqs, max_blocks, ORDERS.value)
        self.distances = torch.zeros((*cells, MAX_CANDIDATES.value), dtype=torch.int32, device=device)
        """int32 ``[max_num_seqs, max_blocks, ORDERS, MAX_CANDIDATES]``: tokens between the place and the end."""
        self.counts = torch.zeros(cells, dtype=torch.int32, device=device)
        """int32 ``[max_num_seqs, max_blocks, ORDERS]``."""


class SuffixLookup:
    """The ring of ended requests' outputs, and the workspace of lookups.

    Args:
        max_num_seqs: Maximum number of requests in a step.
        max_model_len: Maximum number of tokens of a request.
        num_drafts: Number of tokens to propose per request.
        history_tokens: Capacity of the ring in tokens, 8 bytes each; 0 for none.
        device: Device of all tensors.
        block: Positions that one program scans, a power of two.

    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        num_drafts: int,
        history_tokens: int,
        device: torch.device | str,
        block: int = 1024,
    ) -> None:
        self.max_model_len = max_model_len
        self._num_drafts = num_drafts
        self._capacity = history_tokens
        self._block = block
        # Few enough blocks for one program to add up their counts.
        self._ring_block = max(block, triton.next_power_of_2(max(1, history_tokens // MAX_BLOCKS)))
        self._own_block = max(block, triton.next_power_of_2(max(1, max_model_len // MAX_BLOCKS)))
        self._ring = torch.full((history_tokens,), END, dtype=torch.int32, device=device)
        self._groups = torch.full((history_tokens,), NO_GROUP, dtype=torch.int32, device=device)
        self._stop = torch.zeros(1, dtype=torch.int64, device=device)
        self._used = 0
        self._own_found = _Found(max_num_seqs, triton.cdiv(max_model_len, self._own_block), device)
        self._ring_found = _Found(max_num_seqs, max(1, triton.cdiv(history_tokens, self._ring_block)), device)
        numbers = {"dtype": torch.int32, "device": device}
        self._state = torch.full((max_num_seqs, NUM_STATE.value), -1, **numbers)
        """int32 ``[max_num_seqs, NUM_STATE]``: what is known of each row's last draft; see ``suffix_vote``."""
        self._drafted = torch.zeros((max_num_seqs, num_drafts), **numbers)
        self._origins = torch.zeros((max_num_seqs, num_drafts), **numbers)
        self._matched = torch.zeros((max_num_seqs, num_drafts), **numbers)
        self.expected = torch.zeros(max_num_seqs, dtype=torch.float32, device=device)
        """float32 ``[max_num_seqs]``: expected accepted tokens of the last drafts; 0 where nothing was found."""
        self.drafts = torch.zeros((max_num_seqs, num_drafts), dtype=torch.int64, device=device)

    def propose(self, batch: LookupBatch, groups: torch.Tensor | None = None) -> torch.Tensor:
        """The tokens behind earlier occurrences of each request's newest tokens.

        Args:
            batch: The requests.
            groups: int32 ``[requests]``, the group of each, ``NO_GROUP`` for its own tokens alone; None for all.

        Returns:
            int64 ``[requests, num_drafts]``, valid until the next call; a shorter draft is filled up.

        """
        num_requests, stride = len(batch.rows), batch.token_ids.stride(0)
        num_own = self._find(batch, self._own_found, self._own_block, batch.token_ids.shape[1], batch.max_num_tokens)
        num_ring = 0
        if groups is not None and self._used:
            used = min(self._used, self._capacity)
            num_ring = self._find(batch, self._ring_found, self._ring_block, self._capacity, used, groups)
        vote[(num_requests,)](
            self._ring,
            self._stop,
            batch.token_ids,
            batch.num_tokens,
            batch.rows,
            batch.num_sampled,
            self._own_found.distances,
            self._own_found.counts,
            self._ring_found.distances,
            self._ring_found.counts,
            self._state,
            self._drafted,
            self._origins,
            self._matched,
            self.drafts,
            self.expected,
            stride,
            max(self._capacity, 1),
            num_own,
            num_ring,
            self._own_found.max_blocks,
            self._ring_found.max_blocks,
            OWN_BLOCKS=triton.next_power_of_2(self._own_found.max_blocks),
            RING_BLOCKS=triton.next_power_of_2(self._ring_found.max_blocks),
            NUM_DRAFTS=self._num_drafts,
            PADDED=triton.next_power_of_2(self._num_drafts),
        )
        return self.drafts[: len(batch.rows)]

    def _find(
        self,
        batch: LookupBatch,
        found: _Found,
        block: int,
        capacity: int,
        used: int,
        groups: torch.Tensor | None = None,
    ) -> int:
        """Find occurrences in the requests' own tokens, or with ``groups`` in the ring; returns the blocks searched."""
        is_ring = groups is not None
        num_blocks = max(1, min(triton.cdiv(used, block), found.max_blocks))
        find[(len(batch.rows), num_blocks)](
            self._ring if is_ring else batch.token_ids,
            self._groups,
            self._stop,
            batch.token_ids,
            batch.num_tokens,
            batch.rows,
            groups if is_ring else batch.num_sampled,
            batch.num_sampled,
            found.distances,
            found.counts,
            batch.token_ids.stride(0),
            capacity,
            found.max_blocks,
            IS_RING=is_ring,
            BLOCK=block,
        )
        return num_blocks

    def forget(self, row: int) -> None:
        """Another request takes this row: nothing that is known of its last draft counts any more."""
        self._state[row].fill_(-1)

    def append_output(
        self,
        token_ids: torch.Tensor,
        num_tokens: torch.Tensor,
        row: int,
        num_prompt_tokens: int,
        max_num_tokens: int,
        group: int,
    ) -> None:
        """Move the output of a request that has ended into the ring.

        Args:
            token_ids: int32 ``[max_num_seqs, max_model_len]``.
            num_tokens: int32 ``[max_num_seqs]``.
            row: Row of the request.
            num_prompt_tokens: Leading tokens of the row that are not copied.
            max_num_tokens: An upper bound of ``num_tokens[row]``.
            group: Group in which these tokens are found.

        """
        if not self._capacity or max_num_tokens <= num_prompt_tokens:
            return
        _append[(1,)](
            self._ring,
            self._groups,
            self._stop,
            token_ids,
            num_tokens,
            token_ids.stride(0),
            row,
            num_prompt_tokens,
            group,
            self._capacity,
            BLOCK=self._block,
        )
        self._used += max_num_tokens - num_prompt_tokens + 1
