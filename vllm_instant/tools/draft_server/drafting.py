"""What is drafted for one request: a path that runs ahead of the engine, and branches for other likely outcomes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_instant.remote.protocol import ProtocolError, Tail, to_bytes

MIN_SURVIVAL = 0.02
"""A path ends before the probability that all of it is accepted falls below this."""
MAX_ALTERNATIVES = 2
"""Maximum number of other outcomes that are drafted for between two commits."""
MIN_ALTERNATIVE = 0.1
"""Probability, of an outcome and of the path before it, from which it is drafted for."""
ALTERNATIVE_TOKENS = 6
"""Maximum number of tokens of such a branch behind the position where it differs."""


class Guess(NamedTuple):
    """The model's next token and the second most probable one."""

    token: int
    probability: float
    other: int
    other_probability: float


@dataclass(eq=False)
class Path:
    """One branch: tokens from the committed prefix of ``base`` tokens on."""

    number: int
    base: int
    tokens: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    others: list[tuple[int, float]] = field(default_factory=list)
    """For each token the second most probable one, and its probability; (0, 0) where it was drafted for already."""
    num_sent: int = 0
    num_tokens_limit: int | None = None
    """Maximum length; None for as far as the engine asks."""


class DraftedRequest:
    """A live request of an engine.

    Args:
        number: Its number on the engine's connection.
        tokens: Prompt and output so far.
        ahead: Number of tokens to draft beyond the committed ones.

    """

    def __init__(self, number: int, tokens: Sequence[int], ahead: int) -> None:
        self.number = number
        self.committed = array("i", tokens)
        self.num_accepted = self.num_restarts = 0
        """Committed tokens that had been drafted; paths that began anew because the answer is another one."""
        self._limit = len(self.committed) + ahead
        self._next_branch = 0
        self._alternatives = 0
        self._paths: list[Path] = []
        """The path that is extended, then the alternatives to it."""
        self._begin()

    def _begin(self) -> None:
        self._paths = [Path(self._new_branch(), len(self.committed))]
        self._alternatives = 0

    def _new_branch(self) -> int:
        self._next_branch += 1
        return self._next_branch - 1

    @property
    def num_ahead(self) -> int:
        """Number of tokens of the path beyond the committed ones."""
        path = self._paths[0]
        return path.base + len(path.tokens) - len(self.committed)

    def commit(self, position: int, tokens: Sequence[int], ahead: int) -> None:
        """Add committed tokens: the path continues if they are its own, else an alternative, else a new path.

        Raises:
            ProtocolError: The tokens do not follow the committed ones.

        """
        if position != len(self.committed):
            raise ProtocolError(f"tokens from position {len(self.committed)} on were due, found {position}")
        self.committed.extend(tokens)
        self._limit = max(self._limit, len(self.committed) + ahead)
        drafted = self._paths[0]
        fitting = [path for path in self._paths if self._fits(path)]
        if not fitting:
            self.num_restarts += bool(drafted.tokens)
            self._begin()
            return
        self.num_accepted += len(tokens)
        path = max(fitting, key=lambda path: path.base + len(path.tokens))
        path.num_tokens_limit = None
        self._paths, self._alternatives = [path], 0

    def _fits(self, path: Path) -> bool:
        """Whether a path has all committed tokens behind its base."""
        committed = self.committed[path.base :].tolist()
        return len(path.tokens) >= len(committed) and path.tokens[: len(committed)] == committed

    def next_work(self, idle: bool) -> Path | None:
        """Return the path to extend; None if there is enough. With ``idle`` also one for another likely outcome."""
        if self.room(self._paths[0]):
            return self._paths[0]
        if not idle:
            return None
        return next(filter(self.room, self._paths[1:]), None) or self._alternative()

    def room(self, path: Path) -> int:
        """Number of tokens by which a path may grow."""
        length = len(path.tokens)
        room = self._limit - path.base - length
        if path.num_tokens_limit is not None:
            room = min(room, path.num_tokens_limit - length)
        since = len(self.committed) - path.base
        return max(0, room) if float(np.prod(path.probabilities[since:])) >= MIN_SURVIVAL else 0

    def _alternative(self) -> Path | None:
        """A new branch that has the most probable other token in the place of one of the path's tokens."""
        path = self._paths[0]
        if self._alternatives == MAX_ALTERNATIVES:
            return None
        since = len(self.committed) - path.base
        survival, best, where = 1.0, MIN_ALTERNATIVE, -1
        for place in range(since, len(path.tokens)):
            if survival * path.others[place][1] > best:
                best, where = survival * path.others[place][1], place
            survival *= path.probabilities[place]
        if where < 0 or path.base + where >= self._limit:
            return None
        other, probability = path.others[where]
        path.others[where] = (0, 0.0)
        self._alternatives += 1
        branch = Path(
            self._new_branch(),
            len(self.committed),
            [*path.tokens[since:where], other],
            [*path.probabilities[since:where], probability],
            [(0, 0.0)] * (where - since + 1),
            num_tokens_limit=where - since + ALTERNATIVE_TOKENS,
        )
        self._paths.append(branch)
        return branch

    def sequence(self, path: Path) -> npt.NDArray[np.int32]:
        """Return int32 ``[tokens]``: what the path's next token follows."""
        return np.array([*self.committed[: path.base], *path.tokens], np.int32)

    def extend(self, path: Path, guesses: Sequence[Guess]) -> Tail | None:
        """Add drafted tokens to a path; returns the tail to send, or None where the path was dropped meanwhile."""
        if path not in self._paths:
            return None
        for guess in guesses:
            path.tokens.append(guess.token)
            path.probabilities.append(guess.probability)
            path.others.append((guess.other, guess.other_probability))
        begin, end = path.num_sent, min(len(path.tokens), self._limit - path.base)
        if end <= begin:
            return None
        path.num_sent = end
        return Tail(
            self.number,
            path.number,
            path.base,
            path.base + begin,
            len(self.committed),
            path.tokens[begin:end],
            to_bytes(path.probabilities[begin:end]),
        )
