"""Drafts from earlier occurrences: at each position the token for which most of them vote.

The occurrences come from a request's own tokens, from the outputs of other requests, and from where a longer copy of
the request's own tokens was left: edited text continues there, once the edit has passed. A draft token is as confident
as such tokens were right before (``ConfidenceCalibrator``), by source, by length of the match and by agreement.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_instant_plugins.jit import compiled
from vllm_instant_plugins.suffix.index import END

OWN, SHARED, RESUMED = 0, 1, 2
"""Sources of an occurrence: the request's own tokens, other requests' outputs, and the copy that was left."""
SOURCES, AGREEMENTS = 3, 6
"""The classes of agreement: one occurrence, two or three that agree, more that agree, and a token with most, about half
or less of the votes."""

SHORTEST = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 25, 33, 65)
"""The shortest match of each class of lengths."""
KINDS = SOURCES * AGREEMENTS * len(SHORTEST)
"""What a confidence depends on: source, agreement and length, as one number in this order."""

RESUME_WITHIN = 9
"""Limit of the tokens that an edit leaves out of the copied text."""
RESUMED_LENGTH, RESUMED_MATCH_LENGTH = 1, 2
"""Length that a resumed copy counts as, without and on top of a match of its own."""


@compiled
def resumed(own: Any, stop: int, newest: Any, left_at: int) -> tuple[int, int]:
    """Where a copy continues that was left at ``left_at``, whose token was wrong: position and length of the match.

    The token may have been replaced, something may have been put before it, or some tokens may be left out: the place
    before which most of the newest tokens stand, in this order.
    """
    best_place, best_length = -1, -1
    if stop > len(own):
        return best_place, best_length  # the ring has wrapped around
    for tried in range(RESUME_WITHIN + 1):
        place = left_at + (1 - tried if tried < 2 else tried)
        if place < 1 or place >= stop - 1:
            continue
        length, limit = 0, min(8, len(newest), place)
        while length < limit and own[place - 1 - length] == newest[len(newest) - 1 - length]:
            length += 1
        if length > best_length:
            best_place, best_length = place, length
    return best_place, best_length


@compiled
def _agreement(share: float, voters: int) -> int:
    """Class of a vote by the share of the chosen token and the number of occurrences for it; see ``AGREEMENTS``."""
    if share > 0.99:
        return 0 if voters == 1 else 1 if voters < 4 else 2
    return 3 if share > 0.7 else 4 if share > 0.4 else 5


@compiled
def _length_class(length: int) -> int:
    """Number of the class in ``SHORTEST``."""
    found = min(length, len(SHORTEST)) - 1
    while SHORTEST[found] > length:
        found -= 1
    while found + 1 < len(SHORTEST) and SHORTEST[found + 1] <= length:
        found += 1
    return found


@compiled
def vote(
    own: Any,
    own_stop: int,
    shared: Any,
    shared_groups: Any,
    shared_stop: int,
    group: int,
    places: Any,
    lengths: Any,
    sources: Any,
    found: int,
    rates: Any,
    min_survival: float,
    draft: Any,
    confidence: Any,
    matched: Any,
    kinds: Any,
    origins: Any,
) -> int:
    """Continue occurrences by a vote at each position, weighted by the fourth power of their match's length.

    Occurrences that disagree with the chosen token say nothing about the tokens behind it, and drop out.

    Args:
        own: int32 ``[capacity]``, the request's tokens; ``own_stop`` of them count.
        own_stop: see ``own``.
        shared: int32 ``[capacity]``, the ring with the outputs of other requests, up to position ``shared_stop``.
        shared_groups: int32 ``[capacity]``, their groups.
        shared_stop: see ``shared``.
        group: the group that counts.
        places: int64 ``[found]``, positions behind the occurrences; overwritten, as the next two.
        lengths: int64 ``[found]``, lengths of their matches.
        sources: int64 ``[found]``, where they are.
        found: number of occurrences.
        rates: float64 ``[KINDS]``, the rate at which tokens of each kind are right.
        min_survival: the draft ends before the probability that all of it is accepted falls below this.
        draft: int64 ``[limit]``: gets the tokens.
        confidence: float64 ``[limit]``: gets their rates.
        matched: int64 ``[limit]``: gets the length of the longest match before each, earlier draft tokens included.
        kinds: int64 ``[limit]``: gets what each confidence depends on.
        origins: int64 ``[limit]``: gets the positions in ``own`` that they were copied from; -1 for ``shared``.

    Returns:
        Number of draft tokens.

    """
    next_tokens = np.empty(found, np.int64)
    distinct, votes = np.empty(found, np.int64), np.empty(found)
    survival, active = 1.0, found
    for position in range(len(draft)):
        going, choices, total = 0, 0, 0.0
        for a in range(active):
            place, source = places[a] + position, sources[a]
            if source == SHARED:
                at = place % len(shared)
                if place >= shared_stop or shared_groups[at] != group:
                    continue
                token = shared[at]
            else:
                if place >= own_stop:
                    continue
                token = own[place % len(own)]
            if token == END:
                continue
            length = lengths[a] + position
            places[going], lengths[going], sources[going] = places[a], lengths[a], source
            next_tokens[going] = token
            weight = float(length * length) * float(length * length)
            total += weight
            going += 1
            choice = 0
            while choice < choices and distinct[choice] != token:
                choice += 1
            if choice == choices:
                distinct[choice], votes[choice] = token, 0.0
                choices += 1
            votes[choice] += weight
        if going == 0:
            return position
        chosen = 0
        for choice in range(1, choices):
            if votes[choice] > votes[chosen]:
                chosen = choice
        active, longest, source, origin = 0, 0, OWN, -1
        for a in range(going):
            if next_tokens[a] == distinct[chosen]:
                places[active], lengths[active], sources[active] = places[a], lengths[a], sources[a]
                active += 1
                if lengths[a] + position > longest:
                    longest, source, origin = lengths[a] + position, sources[a], places[a] + position
        agreement = _agreement(votes[chosen] / total, active)
        kind = (source * AGREEMENTS + agreement) * len(SHORTEST) + _length_class(longest)
        confident = rates[kind]
        survival *= confident
        if survival < min_survival:
            return position
        draft[position] = distinct[chosen]
        confidence[position] = confident
        matched[position] = longest
        kinds[position] = kind
        origins[position] = -1 if source == SHARED else origin
    return len(draft)
