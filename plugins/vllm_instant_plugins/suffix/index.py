"""Earlier occurrences of the newest tokens: a compact index over token sequences.

It works like the match finder of a Lempel-Ziv compressor: a hash of every ``ORDER`` consecutive tokens leads to their
newest occurrence, and each occurrence to the one before it. Appending a token takes constant time, and finding the
longest earlier occurrence of the newest tokens a bounded walk over the newest ones; memory is at most 32 bytes per
token.

``TokenIndex`` is a ring: when it is full, the oldest tokens are overwritten. It holds either one request's own tokens
or the outputs of many requests that have ended; then every token has the number of its group, and only occurrences in
the group of the lookup are found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.jit import compiled

ORDER = 2
"""Tokens that are hashed: the minimum length of a match."""
MAX_CANDIDATES = 24
"""Limit of the occurrences that are compared, the newest first."""
MAX_MATCH = 32
"""Limit of the length of a match."""

END = -1
"""Marks the end of a sequence in an index."""

Tokens = npt.NDArray[np.int32]
_ENDED = np.array([END], np.int32)


@compiled
def _slot(tokens: Any, stop: int, group: int, mask: int) -> int:
    """Table entry of the ``ORDER`` tokens that end before ``stop`` of a ring."""
    # The finalizer of MurmurHash3, once per token, starting from the group (golden ratio multiplier).
    mixed = np.uint64(group + 1) * np.uint64(0x9E3779B97F4A7C15)
    for back in range(1, ORDER + 1):
        mixed = (mixed ^ np.uint64(tokens[(stop - back) % len(tokens)])) * np.uint64(0xFF51AFD7ED558CCD)
        mixed ^= mixed >> np.uint64(32)
    return int(mixed & np.uint64(mask))


@compiled
def _append(tokens: Any, groups: Any, previous: Any, heads: Any, stop: int, begin: int, new: Any, group: int) -> int:
    """Write ``new`` at position ``stop`` of the ring; its sequence began at ``begin``. Returns the new end."""
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
    """Find occurrences of ``newest``, the newest first; writes the positions behind them and the matches' lengths."""
    capacity, mask, wanted = len(tokens), len(heads) - 1, len(newest)
    if wanted < ORDER:
        return 0
    oldest, last = max(0, stop - capacity), wanted - 1
    wanted = min(wanted, MAX_MATCH)
    place = heads[_slot(newest, last + 1, group, mask)]
    found = 0
    for _ in range(MAX_CANDIDATES):
        # An occurrence is valid while its n-gram and one token behind it are still in the ring.
        if place - ORDER < oldest:
            break
        at = place % capacity
        if place < stop and groups[at] == group:
            # Hashes can collide, so that the tokens themselves are compared, backwards from the occurrence.
            length, limit = 0, min(wanted, place - oldest)
            back = at - 1 if at > 0 else capacity - 1
            while length < limit and groups[back] == group and tokens[back] == newest[last - length]:
                length += 1
                back = back - 1 if back > 0 else capacity - 1
            if length >= ORDER:
                places[found] = place
                lengths[found] = length
                found += 1
                if found == len(places):
                    break
        before = previous[at]
        if before >= place:
            break  # the ring has overwritten this link: older occurrences have lower positions
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
    rates: Any,
    min_survival: float,
    draft: Any,
    confidence: Any,
    matched: Any,
) -> tuple[int, float]:
    """Continue the candidates by a weighted vote: at each position the token with the highest weight.

    With ``n_a`` the length of candidate ``a``'s match, earlier positions of this draft included, its weight is
    ``n_a ** 2``. A token's confidence is its share of the weight of all candidates, times ``rates[n]``, the rate at
    which tokens after matches of that length were right. Returns the number of draft tokens and of expected accepted
    ones. ``places`` and ``lengths`` are overwritten.
    """
    capacity = len(tokens)
    at, next_tokens, weights = np.empty(found, np.int64), np.empty(found, np.int64), np.empty(found)
    for a in range(found):
        at[a] = places[a] % capacity
    survival, expected, active = 1.0, 0.0, found
    for position in range(len(draft)):
        # Drop candidates whose sequence ends here; the others stay in their order, the newest first.
        going, total, agree = 0, 0.0, True
        for a in range(active):
            ring = at[a]
            if places[a] + position < stop and groups[ring] == group and tokens[ring] != END:
                places[going], lengths[going], at[going] = places[a], lengths[a], ring
                next_tokens[going] = tokens[ring]
                weights[going] = float((lengths[a] + position) ** 2)
                total += weights[going]
                agree = agree and next_tokens[going] == next_tokens[0]
                going += 1
        if going == 0:
            return position, expected
        # The token with the highest weight. At most MAX_CANDIDATES candidates: comparing all pairs beats a table.
        best, best_weight = next_tokens[0], total
        if not agree:
            best_weight = 0.0
            for a in range(going):
                weight = 0.0
                for b in range(going):
                    if next_tokens[b] == next_tokens[a]:
                        weight += weights[b]
                if weight > best_weight:
                    best_weight, best = weight, next_tokens[a]
        # Candidates that disagree with the chosen token say nothing about the tokens behind it.
        active = longest = 0
        for a in range(going):
            if next_tokens[a] == best:
                places[active], lengths[active] = places[a], lengths[a]
                at[active] = at[a] + 1 if at[a] + 1 < capacity else 0
                longest = max(longest, lengths[a] + position)
                active += 1
        confident = best_weight / total * rates[min(longest, len(rates) - 1)]
        survival *= confident
        if survival < min_survival:
            return position, expected
        expected += survival
        draft[position] = best
        confidence[position] = confident
        matched[position] = longest
    return len(draft), expected


@compiled
def _propose(
    tokens: Any,
    groups: Any,
    previous: Any,
    heads: Any,
    stop: int,
    newest: Any,
    group: int,
    rates: Any,
    min_survival: float,
    draft: Any,
    confidence: Any,
    matched: Any,
) -> tuple[int, float]:
    """Find and continue; returns the number of draft tokens and of expected accepted ones."""
    places, lengths = np.empty(MAX_CANDIDATES, np.int64), np.empty(MAX_CANDIDATES, np.int64)
    found = _candidates(tokens, groups, previous, heads, stop, newest, group, places, lengths)
    if found == 0:
        return 0, 0.0
    count, expected = _continue(
        tokens, groups, stop, group, places, lengths, found, rates, min_survival, draft, confidence, matched
    )
    return count, expected


class Match(NamedTuple):
    """Proposed tokens, the nearest first."""

    tokens: Tokens
    confidence: npt.NDArray[np.float64]
    """Of each token, given that those before it are right."""
    matched: npt.NDArray[np.int64]
    """Length of the longest match that each token follows, earlier proposed tokens included."""
    expected: float
    """Expected accepted tokens."""


NO_MATCH = Match(np.empty(0, np.int32), np.empty(0), np.empty(0, np.int64), 0.0)


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
        self._tokens: Tokens = np.zeros(capacity, np.int32)
        self._groups: npt.NDArray[np.int32] = np.full(capacity, -1, np.int32)
        self._previous: npt.NDArray[np.int64] = np.zeros(capacity, np.int64)
        self._heads: npt.NDArray[np.int64] = np.zeros(1 << max(8, (capacity - 1).bit_length()), np.int64)

    @property
    def tokens(self) -> Tokens:
        """The tokens of an index that has not wrapped around, shape ``[stop]``."""
        return self._tokens[: self.stop]

    def end_sequence(self, group: int = 0) -> None:
        """Separate the tokens that follow from the tokens before."""
        self.append(_ENDED, group)
        self._begin = self.stop

    def append(self, new: Tokens, group: int = 0) -> None:
        """Add tokens of one group, in amortized constant time per token."""
        needed = self.stop + len(new)
        if needed > len(self._tokens) < self._max_tokens:
            old = self.tokens.copy()
            self._allocate(min(self._max_tokens, max(needed, 2 * len(self._tokens))))
            self.stop = self._write(0, old, group)
        self.stop = self._write(self.stop, new, group)

    def _write(self, stop: int, new: Tokens, group: int) -> int:
        return int(_append(self._tokens, self._groups, self._previous, self._heads, stop, self._begin, new, group))

    def propose(
        self, newest: Tokens, max_draft_tokens: int, rates: npt.NDArray[np.float64], min_survival: float, group: int = 0
    ) -> Match:
        """The tokens that followed earlier occurrences of ``newest``.

        Args:
            newest: int32 ``[any]``, the newest tokens of a request.
            max_draft_tokens: limit of the draft.
            rates: rate at which the token after a match of each length is right, by length.
            min_survival: the draft ends before the probability that all of it is accepted falls below this.
            group: only occurrences in this group count.

        """
        tokens = np.empty(max_draft_tokens, np.int32)
        confidence = np.empty(max_draft_tokens)
        matched = np.empty(max_draft_tokens, np.int64)
        count, expected = _propose(
            self._tokens,
            self._groups,
            self._previous,
            self._heads,
            self.stop,
            newest,
            group,
            rates,
            min_survival,
            tokens,
            confidence,
            matched,
        )
        return Match(tokens[:count], confidence[:count], matched[:count], expected) if count else NO_MATCH
