"""The kernels of ``suffix_lookup``: find earlier occurrences of the newest tokens, and let them vote.

Where the host follows hash chains (``vllm_instant_plugins.suffix.index``), the device scans all positions in parallel:

* ``find``, one program per request and block of positions: the newest occurrences of the last two tokens in that block,
  and those of the last one.
* ``vote``, one program per request: compares the last draft with what came, takes the newest occurrences of all blocks
  of both sources (the request's own tokens, and the ring), the place where a copy was left, and lets them vote.

What is found, and how it votes, is that of ``vllm_instant_plugins.suffix.vote`` to the token. All sums are of whole
numbers or have a fixed order: tensor-parallel workers propose the same tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

ORDERS = tl.constexpr(2)
"""Occurrences of two tokens, and of one where those are few."""
MAX_CANDIDATES = tl.constexpr(24)
"""Limit of the occurrences of one order in one source, the newest first."""
ENOUGH = tl.constexpr(8)
"""From this number on, occurrences of two tokens leave those of one out."""
SOURCE_LANES = tl.constexpr(31)
"""``MAX_CANDIDATES + ENOUGH - 1``: lanes of a source's candidates."""
LANES = tl.constexpr(64)
"""Those of two sources and of a resumed copy, rounded up to a power of two."""
RESUMED_LANE = tl.constexpr(62)
MAX_MATCH = tl.constexpr(32)
"""Limit of the length of a match."""
LONG_COPY = tl.constexpr(9)
"""Match length, earlier draft tokens included, from which a copy is resumed after a wrong token."""
FORGET_AFTER = tl.constexpr(32)
"""Tokens after which a copy is no longer resumed."""
RESUME_WITHIN = tl.constexpr(9)
"""Limit of the tokens that an edit leaves out of the copied text."""
RESUME_LANES = tl.constexpr(16)
RESUMED_LENGTH = tl.constexpr(1)
RESUMED_MATCH_LENGTH = tl.constexpr(2)
"""Length that a resumed copy counts as, without and on top of a match of its own."""
PRIOR_HITS = tl.constexpr(0.5)
PRIOR_MATCH = tl.constexpr(2.0)
"""The confidence after a match of n tokens is (n - PRIOR_HITS) / (n + PRIOR_MATCH), times a factor of the agreement."""
LAST_LENGTH = tl.constexpr(0)
LAST_COUNT = tl.constexpr(1)
LEFT_AT = tl.constexpr(2)
SINCE_LEFT = tl.constexpr(3)
NUM_STATE = tl.constexpr(4)
"""A row's numbers: its tokens at its last draft (-1: none), tokens of that draft, where a long copy went wrong (-1 for
nowhere), and tokens since then."""


@triton.jit(do_not_specialize=["capacity"])
def find(
    tokens_ptr,
    groups_ptr,
    stop_ptr,
    own_ptr,
    num_tokens_ptr,
    rows_ptr,
    request_groups_ptr,
    num_sampled_ptr,
    distances_ptr,
    counts_ptr,
    own_stride,
    capacity,
    max_blocks,
    IS_RING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``[requests, blocks]``; block 0 holds the newest positions.

    Writes how far before the end the newest places are, int32 ``[requests, max_blocks, ORDERS, MAX_CANDIDATES]``, and
    how many, int32 ``[requests, max_blocks, ORDERS]``.
    """
    request, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows_ptr + request)
    length = tl.load(num_tokens_ptr + row).to(tl.int64)
    own = own_ptr + row * own_stride
    if IS_RING:
        tokens, stop, group = tokens_ptr, tl.load(stop_ptr), tl.load(request_groups_ptr + request)
    else:
        tokens, stop, group = own, length, 0
    # A place is behind an occurrence and has a token itself. Requests that do not search have none.
    lowest = tl.maximum(stop - capacity, 0) + 1
    lowest = tl.where(tl.load(num_sampled_ptr + request) > 0, lowest, stop)
    lowest = tl.where(length >= 1, lowest, stop)
    lowest = tl.where(group >= 0, lowest, stop)
    distance = 1 + block * BLOCK + tl.arange(0, BLOCK)
    place = stop - distance
    is_place = place >= lowest
    last = tl.load(own + tl.maximum(length - 1, 0))
    before_last = tl.load(own + tl.maximum(length - 2, 0))
    is_match = is_place & (tl.load(tokens + (place - 1) % capacity, mask=is_place, other=-2) == last)
    if IS_RING:
        is_match = is_match & (tl.load(groups_ptr + place % capacity, mask=is_match, other=-2) == group)
    has_pair = is_match & (place > tl.where(length >= 2, lowest, stop))
    is_pair = has_pair & (tl.load(tokens + (place - 2) % capacity, mask=has_pair, other=-2) == before_last)
    cell = (request * max_blocks + block) * ORDERS
    _store_newest(is_pair, distance, distances_ptr, counts_ptr, cell)
    _store_newest(is_match, distance, distances_ptr, counts_ptr, cell + 1)


@triton.jit
def _store_newest(is_found, distance, distances_ptr, counts_ptr, cell):
    """Write the first ``MAX_CANDIDATES`` distances that are found, and their number."""
    found = is_found.to(tl.int32)
    rank = tl.cumsum(found, axis=0) - 1
    tl.store(distances_ptr + cell * MAX_CANDIDATES + rank, distance, mask=is_found & (rank < MAX_CANDIDATES))
    tl.store(counts_ptr + cell, tl.minimum(tl.sum(found, axis=0), MAX_CANDIDATES))


@triton.jit
def _newest(distances_ptr, counts_ptr, request, index, num_blocks, max_blocks, limit, ORDER, BLOCKS: tl.constexpr):
    """Distance of candidate ``index`` of all blocks, ``[LANES]``, and how many there are, at most ``limit``."""
    block = tl.arange(0, BLOCKS)
    cells = (request * max_blocks + block) * ORDERS + ORDER
    in_block = tl.load(counts_ptr + cells, mask=block < num_blocks, other=0)
    # Candidate c is in the block whose candidates and all newer ones are more than c first.
    before = tl.cumsum(in_block, axis=0) - in_block
    count = tl.minimum(tl.sum(in_block, axis=0), limit)
    holds = (before[None, :] <= index[:, None]) & (index[:, None] < (before + in_block)[None, :])
    its_block = tl.sum(tl.where(holds, block[None, :], 0), axis=1)
    its_rank = index - tl.sum(tl.where(holds, before[None, :], 0), axis=1)
    cell = (request * max_blocks + its_block) * ORDERS + ORDER
    is_one = (index >= 0) & (index < count)
    return tl.load(distances_ptr + cell * MAX_CANDIDATES + its_rank, mask=is_one, other=0), count


@triton.jit
def _candidates(distances_ptr, counts_ptr, request, index, num_blocks, max_blocks, limit, BLOCKS: tl.constexpr):
    """Distances of one source's candidates, 0 for none, and whether each is one of a single token, ``[LANES]``."""
    pairs, num_pairs = _newest(
        distances_ptr, counts_ptr, request, index, num_blocks, max_blocks, limit, 0, BLOCKS=BLOCKS
    )
    singles, num_singles = _newest(
        distances_ptr, counts_ptr, request, index - num_pairs, num_blocks, max_blocks, limit, 1, BLOCKS=BLOCKS
    )
    is_pair = (index >= 0) & (index < num_pairs)
    is_single = (index >= num_pairs) & (index < tl.where(num_pairs < ENOUGH, num_pairs + num_singles, 0))
    return tl.where(is_pair, pairs, tl.where(is_single, singles, 0)), is_single


@triton.jit
def _token_at(own, ring, capacity, place, is_shared, mask):
    """The token at each place of its source; -2 where it is masked."""
    of_ring = tl.load(ring + place % capacity, mask=mask & is_shared, other=-2)
    of_own = tl.load(own + place, mask=mask & (is_shared == 0), other=-2)
    return tl.where(is_shared, of_ring, of_own)


@triton.jit
def _resumed(own, length, left_at):
    """Where a copy continues that was left at ``left_at``, as ``vote.resumed`` of the host; -1 for nowhere."""
    tried = tl.arange(0, RESUME_LANES)
    place = left_at + tl.where(tried < 2, 1 - tried, tried)
    is_place = (tried <= RESUME_WITHIN) & (place >= 1) & (place < tl.where(left_at >= 0, length - 1, 0))
    limit = tl.minimum(tl.minimum(length, place), 8)
    matched = tl.full([RESUME_LANES], 0, tl.int32)
    same = is_place
    for back in range(8):
        same = same & (back < limit)
        wanted = tl.load(own + tl.maximum(length - 1 - back, 0))
        same = same & (tl.load(own + place - 1 - back, mask=same, other=-2) == wanted)
        matched += same.to(tl.int32)
    # Of equal lengths, the place that is tried first.
    best = tl.max(tl.where(is_place, matched * RESUME_LANES + (RESUME_LANES - 1 - tried), -1), axis=0)
    chosen = RESUME_LANES - 1 - best % RESUME_LANES
    best_place = tl.sum(tl.where(is_place & (tried == chosen), place, 0), axis=0)
    return tl.where(best >= 0, best_place, -1), best // RESUME_LANES


@triton.jit
def _where_left(own, length, state_ptr, drafted_ptr, origins_ptr, matched_ptr, row, NUM_DRAFTS, PADDED: tl.constexpr):
    """Compare a row's last draft with the tokens that came: where a long copy was left, and tokens since then."""
    last_length = tl.load(state_ptr + row * NUM_STATE + LAST_LENGTH)
    count = tl.load(state_ptr + row * NUM_STATE + LAST_COUNT)
    left_at = tl.load(state_ptr + row * NUM_STATE + LEFT_AT)
    since_left = tl.load(state_ptr + row * NUM_STATE + SINCE_LEFT)
    # A request that restarts is a new one.
    is_known = (last_length >= 0) & (last_length <= length)
    num_new = tl.where(is_known, length - last_length, 0)
    since_left = tl.where(is_known, since_left + num_new, 0)
    left_at = tl.where(is_known & (since_left <= FORGET_AFTER), left_at, -1)
    comparable = tl.where(is_known, tl.minimum(count, num_new), 0)
    position = tl.arange(0, PADDED)
    is_compared = position < comparable
    came = tl.load(own + last_length + position, mask=is_compared, other=-2)
    cell = row * NUM_DRAFTS + position
    wrong = is_compared & (tl.load(drafted_ptr + cell, mask=is_compared, other=-3) != came)
    first_wrong = tl.min(tl.where(wrong, position, PADDED), axis=0)
    is_there = position == first_wrong
    origin = tl.sum(tl.where(is_there, tl.load(origins_ptr + cell, mask=is_there, other=0), 0), axis=0)
    length_there = tl.sum(tl.where(is_there, tl.load(matched_ptr + cell, mask=is_there, other=0), 0), axis=0)
    is_left = (first_wrong < comparable) & (length_there >= LONG_COPY) & (origin >= 0)
    return tl.where(is_left, origin, left_at), tl.where(is_left, 0, since_left)


@triton.jit
def _factor_of_agreement(share, voters):
    """The prior factor of a token's confidence, by the share of the votes for it and the number of voters."""
    of_all = tl.where(voters == 1, 0.6, tl.where(voters < 4, 0.8, 1.0))
    return tl.where(share > 0.99, of_all, tl.where(share > 0.7, 0.75, tl.where(share > 0.4, 0.5, 0.25)))


@triton.jit(do_not_specialize=["capacity", "num_own_blocks", "num_ring_blocks"])
def vote(
    ring_ptr,
    stop_ptr,
    own_ptr,
    num_tokens_ptr,
    rows_ptr,
    num_sampled_ptr,
    own_distances_ptr,
    own_counts_ptr,
    ring_distances_ptr,
    ring_counts_ptr,
    state_ptr,
    drafted_ptr,
    origins_ptr,
    matched_ptr,
    drafts_ptr,
    expected_ptr,
    own_stride,
    capacity,
    num_own_blocks,
    num_ring_blocks,
    max_own_blocks,
    max_ring_blocks,
    OWN_BLOCKS: tl.constexpr,
    RING_BLOCKS: tl.constexpr,
    NUM_DRAFTS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Grid ``[requests]``. Writes the drafts, the expected number of accepted ones, and each row's state.

    ``num_ring_blocks`` is 0 where nothing is shared. Arrays of state have a row per row of ``own``.
    """
    request = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + request)
    length = tl.load(num_tokens_ptr + row)
    own = own_ptr + row * own_stride
    is_asked = tl.load(num_sampled_ptr + request) > 0
    left_at, since_left = _where_left(
        own, length, state_ptr, drafted_ptr, origins_ptr, matched_ptr, row, NUM_DRAFTS, PADDED=PADDED
    )

    lane = tl.arange(0, LANES)
    own_index = tl.where(lane < SOURCE_LANES, lane, -1)
    # On the host, the newest place of a request's own chain is the end itself.
    distance, is_single = _candidates(
        own_distances_ptr, own_counts_ptr, request, own_index, num_own_blocks, max_own_blocks, MAX_CANDIDATES - 1,
        BLOCKS=OWN_BLOCKS,
    )  # fmt: skip
    ring_index = tl.where((lane >= SOURCE_LANES) & (lane < 2 * SOURCE_LANES), lane - SOURCE_LANES, -1)
    ring_distance, ring_is_single = _candidates(
        ring_distances_ptr, ring_counts_ptr, request, ring_index, num_ring_blocks, max_ring_blocks, MAX_CANDIDATES,
        BLOCKS=RING_BLOCKS,
    )  # fmt: skip
    is_shared = ring_distance > 0
    is_single = is_single | ring_is_single
    stop = tl.where(is_shared, tl.load(stop_ptr), length.to(tl.int64))
    oldest = tl.where(is_shared, tl.maximum(stop - capacity, 0), 0)
    active = (distance > 0) | is_shared
    place = stop - tl.where(is_shared, ring_distance, distance)

    matched = active.to(tl.int32)
    max_back = tl.minimum(place - 1 - oldest, (length - 1).to(tl.int64))
    same = active
    for back in range(1, MAX_MATCH):
        same = same & (max_back >= back)
        wanted = tl.load(own + tl.maximum(length - 1 - back, 0))
        same = same & (_token_at(own, ring_ptr, capacity, place - 1 - back, is_shared, same) == wanted)
        matched += same.to(tl.int32)
    active = active & ((is_single == 0) | (matched < 2))
    # Of one source, the newest MAX_CANDIDATES.
    is_of_ring = lane >= SOURCE_LANES
    rank_own = tl.cumsum((active & (is_of_ring == 0)).to(tl.int32), axis=0)
    rank_ring = tl.cumsum((active & is_of_ring).to(tl.int32), axis=0)
    active = active & (tl.where(is_of_ring, rank_ring, rank_own) <= MAX_CANDIDATES)

    resumed_at, resumed_match = _resumed(own, length, left_at)
    is_resumed = lane == tl.where((resumed_at >= 0) & is_asked, RESUMED_LANE, -1)
    active = active | is_resumed
    place = tl.where(is_resumed, resumed_at.to(tl.int64), place)
    resumed_length = tl.where(resumed_match > 0, resumed_match + RESUMED_MATCH_LENGTH, RESUMED_LENGTH)
    matched = tl.where(is_resumed, resumed_length, matched)

    # What no candidate proposes is verified all the same: its rows are scheduled before the lookup.
    filler = tl.load(own + tl.maximum(length - 1, 0)).to(tl.int64)
    position_of = tl.arange(0, PADDED)
    drafts = tl.full([PADDED], 0, tl.int64) + filler
    origins, lengths = tl.full([PADDED], -1, tl.int32), tl.full([PADDED], 0, tl.int32)
    survival, expected = tl.full((), 1.0, tl.float32), tl.full((), 0.0, tl.float32)
    count = tl.full((), 0, tl.int32)
    for position in range(NUM_DRAFTS):
        active = active & (place + position < stop)
        token = _token_at(own, ring_ptr, capacity, place + position, is_shared, active)
        active = active & (token >= 0)
        weight = tl.where(active, matched + position, 0)
        weight = weight * weight * weight * weight
        agrees = (token[None, :] == token[:, None]) & active[None, :] & active[:, None]
        votes = tl.sum(tl.where(agrees, weight[None, :], 0), axis=1)
        total, most = tl.sum(weight, axis=0), tl.max(votes, axis=0)
        # Of tokens with equal votes, the one of the first candidate.
        winner = tl.min(tl.where(active & (votes == most), lane, LANES), axis=0)
        chosen = tl.sum(tl.where(lane == winner, token, 0), axis=0)
        active = active & (token == chosen)
        longest = tl.max(tl.where(active, matched + position, 0), axis=0)
        first = tl.min(tl.where(active & (matched + position == longest), lane, LANES), axis=0)
        origin = tl.sum(tl.where((lane == first) & (is_shared == 0), place + position + 1, 0), axis=0) - 1
        voters = tl.sum(active.to(tl.int32), axis=0)
        share = most.to(tl.float32) / tl.maximum(total, 1).to(tl.float32)
        rate = (longest.to(tl.float32) - PRIOR_HITS) / (longest.to(tl.float32) + PRIOR_MATCH)
        survival *= tl.where(total > 0, tl.maximum(rate, 0.0) * _factor_of_agreement(share, voters), 0.0)
        expected += survival
        is_here = (position_of == position) & (total > 0)
        drafts = tl.where(is_here, chosen.to(tl.int64), drafts)
        origins = tl.where(is_here, origin.to(tl.int32), origins)
        lengths = tl.where(is_here, longest, lengths)
        count += (total > 0).to(tl.int32)

    tl.store(drafts_ptr + request * NUM_DRAFTS + position_of, drafts, mask=position_of < NUM_DRAFTS)
    tl.store(expected_ptr + request, expected)
    cell = row * NUM_DRAFTS + position_of
    is_draft = position_of < tl.where(is_asked, NUM_DRAFTS, 0)
    tl.store(drafted_ptr + cell, drafts.to(tl.int32), mask=is_draft)
    tl.store(origins_ptr + cell, origins, mask=is_draft)
    tl.store(matched_ptr + cell, lengths, mask=is_draft)
    tl.store(state_ptr + row * NUM_STATE + LAST_LENGTH, length, mask=is_asked)
    tl.store(state_ptr + row * NUM_STATE + LAST_COUNT, count, mask=is_asked)
    tl.store(state_ptr + row * NUM_STATE + LEFT_AT, left_at, mask=is_asked)
    tl.store(state_ptr + row * NUM_STATE + SINCE_LEFT, since_left, mask=is_asked)
