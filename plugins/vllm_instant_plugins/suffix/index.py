"""Earlier occurrences of the newest tokens: a compact index over token sequences.

It works like the match finder of a Lempel-Ziv compressor: a hash of every two consecutive tokens leads to their newest
occurrence, and each occurrence to the one before it; single tokens have such a chain as well. Appending a token takes
constant time, and finding the longest earlier occurrence of the newest tokens a bounded walk over the newest ones;
memory is at most 32 bytes per token.

``TokenIndex`` is a ring: when it is full, the oldest tokens are overwritten. It holds either one request's own tokens
or the outputs of many requests that have ended; then every token has the number of its group, and only occurrences in
the group of the lookup are found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.jit import compiled

ORDERS = (2, 1)
"""Tokens that are hashed: one chain of occurrences each, the longer ones first."""
MAX_CANDIDATES = 24
"""Limit of the occurrences that are compared, the newest first."""
ENOUGH_CANDIDATES = 8
"""Occurrences of two tokens beside which those of the newest token alone are not looked at."""
MAX_MATCH = 32
"""Limit of the length of a match."""

END = -1
"""Marks the end of a sequence in an index."""
WRAP = 0xFFFFFFFF
"""Links keep the lowest 32 bits of positions."""

Tokens = npt.NDArray[np.int32]
_ENDED = np.array([END], np.int32)


@compiled
def _slot(tokens: Any, stop: int, order: int, group: int, mask: int) -> int:
    """Table entry of the ``order`` tokens that end before ``stop`` of a ring."""
    # The finalizer of MurmurHash3, once per token, starting from the group (golden ratio multiplier).
    mixed = np.uint64(group + 1) * np.uint64(0x9E3779B97F4A7C15)
    at = stop % len(tokens)
    for _ in range(order):
        at = at - 1 if at > 0 else len(tokens) - 1
        mixed = (mixed ^ np.uint64(tokens[at])) * np.uint64(0xFF51AFD7ED558CCD)
        mixed ^= mixed >> np.uint64(32)
    return int(mixed & np.uint64(mask))


@compiled
def append(tokens: Any, groups: Any, links: Any, heads: Any, stop: int, begin: int, new: Any, group: int) -> int:
    """Write ``new`` at position ``stop`` of the ring; its sequence began at ``begin``. Returns the new end."""
    capacity, mask = len(tokens), heads.shape[1] - 1
    at = stop % capacity
    for token in new:
        tokens[at] = token
        groups[at] = group
        stop += 1
        at = at + 1 if at + 1 < capacity else 0
        for chain in range(len(ORDERS)):
            if stop - begin >= ORDERS[chain]:
                slot = _slot(tokens, stop, ORDERS[chain], group, mask)
                links[chain, at] = heads[chain, slot]
                heads[chain, slot] = np.uint32(stop & WRAP)
    return stop


@compiled
def _position(link: int, stop: int) -> int:
    """The newest position up to ``stop`` with these lowest 32 bits."""
    return stop - ((stop - link) & WRAP)


@compiled
def find(
    tokens: Any, groups: Any, links: Any, heads: Any, stop: int, newest: Any, group: int, places: Any, lengths: Any
) -> int:
    """Find earlier occurrences of the newest tokens: those of several tokens, and where they are few those of one.

    Args:
        tokens: int32 ``[capacity]``, the ring of an index; the next three are an index's other arrays.
        groups: int32 ``[capacity]``.
        links: uint32 ``[chains, capacity]``.
        heads: uint32 ``[chains, entries]``.
        stop: tokens that were appended to the index in total.
        newest: int32 ``[any]``.
        group: only occurrences in this group count.
        places: int64 ``[limit]``: gets the positions behind the occurrences, the newest first in each chain.
        lengths: int64 ``[limit]``: gets the lengths of the matches.

    Returns:
        Number of occurrences.

    """
    capacity, mask, last = len(tokens), heads.shape[1] - 1, len(newest) - 1
    wanted, oldest, found = min(len(newest), MAX_MATCH), max(0, stop - capacity), 0
    for chain in range(len(ORDERS)):
        order = ORDERS[chain]
        if wanted < order or found >= ENOUGH_CANDIDATES:
            continue
        place = _position(int(heads[chain, _slot(newest, last + 1, order, group, mask)]), stop)
        for _ in range(MAX_CANDIDATES):
            # An occurrence is valid while its tokens and one behind them are still in the ring.
            if place - order < oldest:
                break
            at = place % capacity
            if place < stop and groups[at] == group:
                # Hashes can collide, so that the tokens themselves are compared, backwards from the occurrence.
                length, limit = 0, min(wanted, place - oldest)
                back = at - 1 if at > 0 else capacity - 1
                while length < limit and groups[back] == group and tokens[back] == newest[last - length]:
                    length += 1
                    back = back - 1 if back > 0 else capacity - 1
                # The second chain passes what the first one has found.
                if length >= order and (chain == 0 or length < ORDERS[chain - 1]):
                    places[found] = place
                    lengths[found] = length
                    found += 1
                    if found == len(places):
                        return found
            before = _position(int(links[chain, at]), stop)
            if before >= place:
                break  # the ring has overwritten this link: older occurrences have lower positions
            place = before
    return found


class IndexArrays(NamedTuple):
    """What compiled functions read of an index."""

    tokens: Tokens
    groups: npt.NDArray[np.int32]
    links: npt.NDArray[np.uint32]
    heads: npt.NDArray[np.uint32]


class TokenIndex:
    """A ring of tokens in which earlier occurrences are found.

    Args:
        capacity: limit of the tokens.
        growing: start small and grow up to ``capacity`` (an index of one request) instead of allocating all at once.

    """

    def __init__(self, capacity: int, growing: bool = False) -> None:
        self._max_tokens = capacity
        self._allocate(min(capacity, 512) if growing else capacity)
        self.stop = 0
        """Tokens that were appended in total."""
        self._begin = 0

    def _allocate(self, capacity: int) -> None:
        entries = 1 << max(8, (capacity - 1).bit_length())
        self.arrays = IndexArrays(
            np.zeros(capacity, np.int32),
            np.full(capacity, -1, np.int32),
            np.zeros((len(ORDERS), capacity), np.uint32),
            np.zeros((len(ORDERS), entries), np.uint32),
        )

    @property
    def tokens(self) -> Tokens:
        """The tokens of an index that has not wrapped around, shape ``[stop]``."""
        return self.arrays.tokens[: self.stop]

    def end_sequence(self, group: int = 0) -> None:
        """Separate the tokens that follow from the tokens before."""
        self.append(_ENDED, group)
        self._begin = self.stop

    def append(self, new: Tokens, group: int = 0) -> None:
        """Add tokens of one group, in amortized constant time per token."""
        self.reserve(self.stop + len(new), group)
        self.stop = self._write(self.stop, new, group)

    def reserve(self, num_tokens: int, group: int = 0) -> None:
        """Make room for this many tokens, all of one group, where the index still grows."""
        capacity = len(self.arrays.tokens)
        if num_tokens > capacity < self._max_tokens:
            old = self.tokens.copy()
            self._allocate(min(self._max_tokens, max(num_tokens, 2 * capacity)))
            self.stop = self._write(0, old, group)

    def _write(self, stop: int, new: Tokens, group: int) -> int:
        return int(append(*self.arrays, stop, self._begin, new, group))
