"""Drafts that have arrived, by request: branches that continue a committed prefix.

A branch begins at the end of a committed prefix and grows at its end. Committed tokens never change, so that a branch
is either right so far or wrong for good, however late it arrives: a draft is taken from it only if all of its tokens up
to the newest committed one are the committed ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_instant.remote.protocol import MAX_AHEAD, Tail

MAX_BRANCHES = 4
"""Maximum number of branches per request, the newest ones."""
LAG_MEMORY = 0.9
"""Factor, per tail, of the largest lag seen."""
LAG_MARGIN = 1.5
"""A draft server works this many lags ahead, since round trips vary."""
PROBABILITIES = 8
"""Number of classes of stated probabilities, each of the same width."""
NO_PROBABILITY = PROBABILITIES
"""The class of a token whose drafter states none."""


class Branch(NamedTuple):
    """Drafted tokens from a position on; never changed, so that two threads may read it."""

    number: int
    base: int
    """Number of committed tokens that it continues."""
    start: int
    """Position of the first of ``tokens``, at least ``base``; its tokens between are committed ones."""
    tokens: tuple[int, ...]
    probabilities: tuple[int, ...]
    """For each token the class of the drafter's probability, or ``NO_PROBABILITY``."""
    seen: tuple[int, ...]
    """For each token the number of committed tokens that were known when it was drafted."""

    @property
    def stop(self) -> int:
        """Position behind the last token."""
        return self.start + len(self.tokens)


class Continuation(NamedTuple):
    """The part of a branch behind the committed tokens."""

    tokens: Sequence[int]
    probabilities: Sequence[int]
    """For each token the class of the drafter's probability, or ``NO_PROBABILITY``."""
    ages: Sequence[int]
    """For each token the number of tokens between the newest one that its drafter knew and itself."""


class RequestBranches:
    """The branches of one request.

    Args:
        tokens: The committed tokens.
        ahead: Number of tokens that may be drafted beyond these.
        vocab_size: Number of token ids of the target.

    """

    def __init__(self, tokens: Iterable[int], ahead: int, vocab_size: int) -> None:
        self.tokens = array("i", tokens)
        """The committed tokens."""
        self.published: tuple[Branch, ...] = ()
        """The branches, the newest last; replaced as a whole."""
        self._vocab_size = vocab_size
        self._limit = len(self.tokens) + ahead
        """Largest position up to which drafts were ever asked for."""
        self._newest = -1
        self._lag = 0.0

    def commit(self, tokens: Iterable[int], ahead: int) -> None:
        """Add committed tokens, and drop the branches that have others."""
        before = len(self.tokens)
        self.tokens.extend(tokens)
        self._limit = max(self._limit, len(self.tokens) + ahead)
        if self.published:
            kept = (self._verified(branch, max(branch.start, before)) for branch in self.published)
            self.published = tuple(branch for branch in kept if branch is not None)

    def add(self, tail: Tail) -> bool:
        """Add a tail; returns False if it is not one that an honest drafter sends."""
        stop = tail.position + len(tail.tokens)
        if (
            not tail.base <= tail.seen <= len(self.tokens)
            or tail.position < tail.base
            or stop > self._limit
            or len(tail.probabilities) not in (0, len(tail.tokens))
            or max(tail.tokens) >= self._vocab_size
        ):
            return False
        self._lag = max(LAG_MEMORY * self._lag, float(len(self.tokens) - tail.seen))
        known = next((branch for branch in self.published if branch.number == tail.branch), None)
        if known is None:
            if tail.branch <= self._newest:
                return True  # it continues a branch that was dropped meanwhile
            if tail.position != tail.base:
                return False
            self._newest = tail.branch
            known = Branch(tail.branch, tail.base, tail.base, (), (), ())
        elif tail.position != known.stop or tail.base != known.base:
            return False
        longer = self._verified(_extended(known, tail), tail.position)
        others = [branch for branch in self.published if branch.number != tail.branch]
        if longer is not None:
            others.append(longer)
        self.published = tuple(others[-MAX_BRANCHES:])
        return True

    def _verified(self, branch: Branch, begin: int) -> Branch | None:
        """The branch without the tokens that are committed; None if one from position ``begin`` on differs.

        A branch that ends before the committed tokens do is kept, since its next tail may be on the way.
        """
        end = min(branch.stop, len(self.tokens))
        at = end - branch.start
        if at <= 0:
            return branch
        if branch.tokens[begin - branch.start : at] != tuple(self.tokens[begin:end]):
            return None
        return branch._replace(
            start=end, tokens=branch.tokens[at:], probabilities=branch.probabilities[at:], seen=branch.seen[at:]
        )

    def ahead(self, max_draft_tokens: int) -> int:
        """The number of tokens to draft beyond the committed ones, for a whole draft to be there when it is used."""
        return min(MAX_AHEAD, 1 + 2 * max_draft_tokens + int(LAG_MARGIN * self._lag))


def _extended(branch: Branch, tail: Tail) -> Branch:
    count = len(tail.tokens)
    probabilities = tuple(step * PROBABILITIES >> 8 for step in tail.probabilities) or (NO_PROBABILITY,) * count
    return branch._replace(
        tokens=branch.tokens + tuple(tail.tokens),
        probabilities=branch.probabilities + probabilities,
        seen=branch.seen + (tail.seen,) * count,
    )


def continuation(
    branches: Iterable[Branch], token_ids: npt.NDArray[np.int32], max_draft_tokens: int
) -> Continuation | None:
    """Return the longest draft that fits a request; None if there is none.

    Args:
        branches: Of the request.
        token_ids: int32 ``[num_tokens]``, its tokens.
        max_draft_tokens: Maximum length of the draft, at least 1.

    """
    num_tokens = len(token_ids)
    best: Branch | None = None
    for branch in branches:
        since = num_tokens - branch.start
        if (
            0 <= since < len(branch.tokens)
            and (best is None or branch.stop >= best.stop)
            # Committed since the branch was published; mostly none or a few tokens.
            and (since == 0 or list(branch.tokens[:since]) == token_ids[branch.start :].tolist())
        ):
            best = branch
    if best is None:
        return None
    at = num_tokens - best.start
    stop = at + max_draft_tokens
    ages = [num_tokens + place - known for place, known in enumerate(best.seen[at:stop])]
    return Continuation(best.tokens[at:stop], best.probabilities[at:stop], ages)
