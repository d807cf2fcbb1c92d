"""Where the newest tokens stood before: a compact index over token sequences.

Like the match finder of a Lempel-Ziv compressor: a hash of every ``ORDER`` consecutive tokens leads to the newest place
where they stood, and from each place to the one before it. Appending a token costs a constant, finding the longest
earlier occurrence of the newest tokens a bounded walk over the newest places; memory is at most 32 bytes a token.

``TokenIndex`` is a ring: when it is full, the oldest tokens make room. It holds either one request's own tokens or
the outputs of many requests that have ended; then every token carries the number of its group, and only places of the
asking group are found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.jit import compiled

ORDER = 2
"""Tokens that are hashed: the shortest match that counts."""
MAX_CANDIDATES = 24
"""Newest places that are compared."""
MAX_MATCH = 32
"""Tokens up to which matches are told apart."""

END = -1
"""Stands in an index where a sequence ends."""

Tokens = npt.NDArray[np.int32]
_ENDED = np.array([END], np.int32)


@compiled
def _slot(tokens: Any, stop: int, group: int, mask: int) -> int:
    """Table entry of the ``ORDER`` tokens that end before ``stop`` of a ring."""
    mixed = np.uint64(group + 1) * np.uint64(0x9E3779B97F4A7C15)
    for back in range(1, ORDER + 1):
        mixed = (mixed ^ np.uint64(tokens[(stop - back) % len(tokens)])) * np.uint64(0xFF51AFD7ED558CCD)
        mixed ^= mixed >> np.uint64(32)
    return int(mixed & np.uint64(mask))


@compiled
def _append(tokens: Any, groups: Any, previous: Any, heads: Any, stop: int, begin: int, new: Any, group: int) -> int:
    """Write ``new`` behind place ``stop`` of the ring; its sequence began at ``begin``. Returns the new end."""
    capacity, mask = len(tokens), len(heads) - 1
    for token in new:
        tokens[stop % capacity] = token
        groups[stop % capacity] = group
        stop += 1
        if stop - begin >= ORDER:
            slot = _slot(tokens, stop, group, mask)
            previous[stop % capacity] = heads[slot]
            heads[slot] = stop
    return stop


@compiled
def _candidates(
    tokens: Any, groups: Any, previous: Any, heads: Any, stop: int, newest: Any, group: int, places: Any, lengths: Any
) -> int:
    """Find where ``newest`` stood; writes the places behind it and the matches' lengths, the newest first."""
    capacity, mask, wanted = len(tokens), len(heads) - 1, len(newest)
    if wanted < ORDER:
        return 0
    oldest = max(0, stop - capacity)
    place = heads[_slot(newest, wanted, group, mask)]
    found = 0
    for _ in range(MAX_CANDIDATES):
        # A place is good while its n-gram and one token behind it are still in the ring.
        if place - ORDER < oldest:
            break
        if place < stop and groups[place % capacity] == group:
            length = 0
            while (
                length < wanted
                and length < MAX_MATCH
                and place - 1 - length >= oldest
                and groups[(place - 1 - length) % capacity] == group
                and tokens[(place - 1 - length) % capacity] == newest[wanted - 1 - length]
            ):
                length += 1
            if length >= ORDER:
                places[found] = place
                lengths[found] = length
                found += 1
                if found == len(places):
                    break
        before = previous[place % capacity]
        if before >= place:
            break
        place = before
    return found


@compiled
def _continue(
    tokens: Any,
    groups: Any,
    stop: int,
    group: int,
    places: Any,
    lengths: Any,
    found: int,
    hit_rates: Any,
    least: float,
    draft: Any,
    confidence: Any,
    matched: Any,
) -> int:
    """Follow what the candidates have in common: at each position the token with the most weight.

    The weight of a candidate grows with the length of its match. A token's confidence is the share of its weight, times
    the rate at which matches that long came true (``hit_rates`` by length).
    """
    capacity = len(tokens)
    active = np.ones(found, np.bool_)
    reach = 1.0
    for position in range(len(draft)):
        total = best_weight = 0.0
        best = -1
        longest = 0
        for a in range(found):
            place = places[a] + position
            ended = place >= stop or groups[place % capacity] != group or tokens[place % capacity] == END
            if not active[a] or ended:
                active[a] = False
                continue
            weight = float((lengths[a] + position) ** 2)
            total += weight
        for a in range(found):
            if not active[a]:
                continue
            token = tokens[(places[a] + position) % capacity]
            weight = 0.0
            for b in range(found):
                if active[b] and tokens[(places[b] + position) % capacity] == token:
                    weight += float((lengths[b] + position) ** 2)
            if weight > best_weight:
                best_weight, best = weight, token
        if best < 0:
            return position
        for a in range(found):
            if active[a]:
                if tokens[(places[a] + position) % capacity] == best:
                    longest = max(longest, lengths[a] + position)
                else:
                    active[a] = False
        sure = best_weight / total * hit_rates[min(longest, len(hit_rates) - 1)]
        reach *= sure
        if reach < least:
            return position
        draft[position] = best
        confidence[position] = sure
        matched[position] = longest
    return len(draft)


class Match(NamedTuple):
    """Proposed tokens, the nearest first."""

    tokens: Tokens
    confidence: npt.NDArray[np.float64]
    """Of each token, given that those before it are right."""
    matched: npt.NDArray[np.int64]
    """Length of the longest match that each token follows, earlier proposed tokens included."""


NOTHING = Match(np.empty(0, np.int32), np.empty(0), np.empty(0, np.int64))


class TokenIndex:
    """A ring of tokens in which earlier occurrences are found.

    Args:
        capacity: tokens that are kept.
        growing: start small and grow up to ``capacity`` (an index of one request) instead of allocating all at once.

    """

    def __init__(self, capacity: int, growing: bool = False) -> None:
        self._most = capacity
        self._allocate(min(capacity, 512) if growing else capacity)
        self.stop = 0
        """Tokens that were ever appended."""
        self._begin = 0

    def _allocate(self, capacity: int) -> None:
        self._tokens: Tokens = np.zeros(capacity, np.int32)
        self._groups: npt.NDArray[np.int32] = np.full(capacity, -1, np.int32)
        self._previous: npt.NDArray[np.int64] = np.zeros(capacity, np.int64)
        self._heads: npt.NDArray[np.int64] = np.zeros(1 << max(8, (capacity - 1).bit_length()), np.int64)

    @property
    def tokens(self) -> Tokens:
        """The tokens of an index that has not wrapped around, shape ``[stop]``."""
        return self._tokens[: self.stop]

    def end_sequence(self, group: int = 0) -> None:
        """What is appended from now on does not continue what was appended before."""
        self.append(_ENDED, group)
        self._begin = self.stop

    def append(self, new: Tokens, group: int = 0) -> None:
        """Add tokens of one group, amortised constant time a token."""
        needed = self.stop + len(new)
        if needed > len(self._tokens) < self._most:
            old = self.tokens.copy()
            self._allocate(min(self._most, max(needed, 2 * len(self._tokens))))
            self.stop = self._write(0, old, group)
        self.stop = self._write(self.stop, new, group)

    def _write(self, stop: int, new: Tokens, group: int) -> int:
        return int(_append(self._tokens, self._groups, self._previous, self._heads, stop, self._begin, new, group))

    def propose(
        self, newest: Tokens, most: int, hit_rates: npt.NDArray[np.float64], least: float, group: int = 0
    ) -> Match:
        """What followed earlier occurrences of ``newest``.

        Args:
            newest: int32 ``[any]``, the newest tokens of a request.
            most: most tokens to propose.
            hit_rates: how often the token after a match of each length came true, by length.
            least: the proposal ends before the chance that all of it is accepted falls below this.
            group: only places of this group count.

        """
        places, lengths = np.empty(MAX_CANDIDATES, np.int64), np.empty(MAX_CANDIDATES, np.int64)
        found = _candidates(
            self._tokens, self._groups, self._previous, self._heads, self.stop, newest, group, places, lengths
        )
        if not found:
            return NOTHING
        tokens, confidence, matched = np.empty(most, np.int32), np.empty(most), np.empty(most, np.int64)
        count = _continue(
            self._tokens,
            self._groups,
            self.stop,
            group,
            places,
            lengths,
            found,
            hit_rates,
            least,
            tokens,
            confidence,
            matched,
        )
        return Match(tokens[:count], confidence[:count], matched[:count]) if count else NOTHING
