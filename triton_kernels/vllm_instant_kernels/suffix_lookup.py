"""Lookup of the newest tokens among earlier ones, on the device and without synchronisation with the host.

The newest ``MAX_CANDIDATES`` earlier occurrences of the last two tokens vote, weighted by the square of the length of
their match. Where the host follows a hash chain (``vllm_instant_plugins.suffix.index``), the device scans all positions
in parallel:

* ``_find``, one program per request and block of positions: the newest occurrences in that block.
* ``_vote``, one program per request: the newest occurrences of all blocks, the lengths of their matches, and the vote.

The tokens are either a request's own or a ring of outputs of requests that have ended, where each token has the
number of its group and only occurrences in the request's group count; ``append_output`` writes it. All sums have a
fixed order: tensor-parallel workers propose the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MAX_CANDIDATES = tl.constexpr(24)
"""Limit of the occurrences that vote, the newest first."""
LANES = tl.constexpr(32)
"""``MAX_CANDIDATES`` rounded up to a power of two."""
MAX_MATCH = tl.constexpr(32)
"""Limit of the length of a match."""
PRIOR_MATCH = tl.constexpr(2.0)
"""The confidence of a match of n tokens is n / (n + PRIOR_MATCH)."""
END = -1
"""Marks the end of an output in the ring."""
NO_GROUP = -1
"""Group of a request that does not search the ring."""


@triton.jit(do_not_specialize=["capacity"])
def _find(
    tokens_ptr,
    groups_ptr,
    stop_ptr,
    own_ptr,
    num_tokens_ptr,
    rows_ptr,
    request_groups_ptr,
    num_sampled_ptr,
    places_ptr,
    counts_ptr,
    own_stride,
    capacity,
    max_blocks,
    IS_RING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``[requests, blocks]``; block 0 holds the newest positions. Writes the newest places and their number."""
    request, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows_ptr + request)
    length = tl.load(num_tokens_ptr + row).to(tl.int64)
    own = own_ptr + row * own_stride
    if IS_RING:
        tokens, stop, group = tokens_ptr, tl.load(stop_ptr), tl.load(request_groups_ptr + request)
    else:
        tokens, stop, group = own, length, 0
    # A place is behind an occurrence and has a token itself. Requests that do not search have none.
    lowest = tl.maximum(stop - capacity, 0) + 2
    lowest = tl.where(tl.load(num_sampled_ptr + request) > 0, lowest, stop)
    lowest = tl.where(length >= 2, lowest, stop)
    lowest = tl.where(group >= 0, lowest, stop)
    place = stop - 1 - block * BLOCK - tl.arange(0, BLOCK)
    is_place = place >= lowest
    last = tl.load(own + tl.maximum(length - 1, 0))
    before_last = tl.load(own + tl.maximum(length - 2, 0))
    is_match = is_place & (tl.load(tokens + (place - 1) % capacity, mask=is_place, other=-2) == last)
    is_match = is_match & (tl.load(tokens + (place - 2) % capacity, mask=is_match, other=-2) == before_last)
    if IS_RING:
        is_match = is_match & (tl.load(groups_ptr + place % capacity, mask=is_match, other=-2) == group)
    found = is_match.to(tl.int32)
    rank = tl.cumsum(found, axis=0) - 1
    cell = request * max_blocks + block
    tl.store(places_ptr + cell * MAX_CANDIDATES + rank, place, mask=is_match & (rank < MAX_CANDIDATES))
    tl.store(counts_ptr + cell, tl.minimum(tl.sum(found, axis=0), MAX_CANDIDATES))


@triton.jit(do_not_specialize=["capacity", "num_blocks"])
def _vote(
    tokens_ptr,
    stop_ptr,
    own_ptr,
    num_tokens_ptr,
    rows_ptr,
    places_ptr,
    counts_ptr,
    drafts_ptr,
    expected_ptr,
    own_stride,
    capacity,
    num_blocks,
    max_blocks,
    IS_RING: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM_DRAFTS: tl.constexpr,
    NUM_DRAFTS_PADDED: tl.constexpr,
):
    """Grid ``[requests]``. Writes the drafts and the expected number of accepted ones.

    Over the ring, where a request's own tokens are expected to bring as many, its drafts are left as they are.
    """
    request = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + request)
    length = tl.load(num_tokens_ptr + row).to(tl.int64)
    own = own_ptr + row * own_stride
    if IS_RING:
        tokens, stop = tokens_ptr, tl.load(stop_ptr)
    else:
        tokens, stop = own, length
    oldest = tl.maximum(stop - capacity, 0)

    # Candidate c is in the block whose candidates and all newer ones are more than c first.
    lane = tl.arange(0, LANES)
    block = tl.arange(0, BLOCKS)
    in_block = tl.load(counts_ptr + request * max_blocks + block, mask=block < num_blocks, other=0)
    before = tl.cumsum(in_block, axis=0) - in_block
    holds = (before[None, :] <= lane[:, None]) & (lane[:, None] < (before + in_block)[None, :])
    active = (lane < tl.sum(in_block, axis=0)) & (lane < MAX_CANDIDATES)
    its_block = tl.sum(tl.where(holds, block[None, :], 0), axis=1)
    its_rank = lane - tl.sum(tl.where(holds, before[None, :], 0), axis=1)
    cell = (request * max_blocks + its_block) * MAX_CANDIDATES + its_rank
    place = tl.load(places_ptr + cell, mask=active, other=0)

    matched = tl.full([LANES], 2, tl.int32)
    max_back = tl.minimum(place - 1 - oldest, length - 1)
    same = active
    for back in range(2, MAX_MATCH):
        same = same & (max_back >= back)
        wanted = tl.load(own + tl.maximum(length - 1 - back, 0))
        same = same & (tl.load(tokens + (place - 1 - back) % capacity, mask=same, other=-2) == wanted)
        matched += same.to(tl.int32)

    # What no candidate proposes is verified all the same: its rows are scheduled before the lookup.
    filler = tl.load(own + tl.maximum(length - 1, 0)).to(tl.int64)
    position_of = tl.arange(0, NUM_DRAFTS_PADDED)
    drafts = tl.full([NUM_DRAFTS_PADDED], 0, tl.int64) + filler
    survival = tl.full((), 1.0, tl.float32)
    expected = tl.full((), 0.0, tl.float32)
    for position in range(NUM_DRAFTS):
        active = active & (place + position < stop)
        token = tl.load(tokens + (place + position) % capacity, mask=active, other=-1)
        active = active & (token >= 0)
        weight = tl.where(active, (matched + position) * (matched + position), 0)
        agrees = (token[None, :] == token[:, None]) & active[None, :] & active[:, None]
        votes = tl.sum(tl.where(agrees, weight[None, :], 0), axis=1)
        total, most = tl.sum(weight, axis=0), tl.max(votes, axis=0)
        # Of tokens with equal votes, the one of the newest occurrence.
        winner = tl.min(tl.where(active & (votes == most), lane, LANES), axis=0)
        chosen = tl.sum(tl.where(lane == winner, token, 0), axis=0)
        active = active & (token == chosen)
        longest = tl.max(tl.where(active, matched + position, 0), axis=0).to(tl.float32)
        share = most.to(tl.float32) / tl.maximum(total, 1).to(tl.float32)
        survival *= share * longest / (longest + PRIOR_MATCH)
        expected += survival
        drafts = tl.where((position_of == position) & (total > 0), chosen.to(tl.int64), drafts)

    num_written = NUM_DRAFTS
    if IS_RING:
        expected_own = tl.load(expected_ptr + request)
        num_written = tl.where(expected > expected_own, NUM_DRAFTS, 0)
        expected = tl.maximum(expected, expected_own)
    tl.store(drafts_ptr + request * NUM_DRAFTS + position_of, drafts, mask=position_of < num_written)
    tl.store(expected_ptr + request, expected)


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
        self._ring_block = max(block, triton.next_power_of_2(max(1, history_tokens // 256)))
        self._max_blocks = max(triton.cdiv(max_model_len, block), triton.cdiv(history_tokens, self._ring_block))
        self._ring = torch.full((history_tokens,), END, dtype=torch.int32, device=device)
        self._groups = torch.full((history_tokens,), NO_GROUP, dtype=torch.int32, device=device)
        self._stop = torch.zeros(1, dtype=torch.int64, device=device)
        self._used = 0
        cells = (max_num_seqs, self._max_blocks)
        self._places = torch.zeros((*cells, MAX_CANDIDATES.value), dtype=torch.int64, device=device)
        self._counts = torch.zeros(cells, dtype=torch.int32, device=device)
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
        self._look_up(batch, batch.token_ids.shape[1], batch.max_num_tokens, self._block, None)
        if groups is not None and self._used:
            self._look_up(batch, self._capacity, min(self._used, self._capacity), self._ring_block, groups)
        return self.drafts[: len(batch.rows)]

    def _look_up(self, batch: LookupBatch, capacity: int, used: int, block: int, groups: torch.Tensor | None) -> None:
        is_ring = groups is not None
        stride = batch.token_ids.stride(0)
        num_requests, num_blocks = len(batch.rows), max(1, min(triton.cdiv(used, block), self._max_blocks))
        _find[(num_requests, num_blocks)](
            self._ring if is_ring else batch.token_ids,
            self._groups,
            self._stop,
            batch.token_ids,
            batch.num_tokens,
            batch.rows,
            groups if is_ring else batch.num_sampled,
            batch.num_sampled,
            self._places,
            self._counts,
            stride,
            capacity,
            self._max_blocks,
            IS_RING=is_ring,
            BLOCK=block,
        )
        _vote[(num_requests,)](
            self._ring if is_ring else batch.token_ids,
            self._stop,
            batch.token_ids,
            batch.num_tokens,
            batch.rows,
            self._places,
            self._counts,
            self.drafts,
            self.expected,
            stride,
            capacity,
            num_blocks,
            self._max_blocks,
            IS_RING=is_ring,
            BLOCKS=triton.next_power_of_2(self._max_blocks),
            NUM_DRAFTS=self._num_drafts,
            NUM_DRAFTS_PADDED=triton.next_power_of_2(self._num_drafts),
        )

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
