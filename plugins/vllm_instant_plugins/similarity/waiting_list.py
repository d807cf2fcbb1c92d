"""Who waits, in the order of arrival: an array that is kept up to date, so that nobody has to gather it."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.intp]


class Line:
    """The waiting requests, by ``RequestState.index``.

    Args:
        size: a first size; it grows.

    """

    def __init__(self, size: int) -> None:
        self._indices: Indices = np.zeros(size, np.intp)
        self._numbers: list[int] = []
        """Of the same requests: they are numbered as they come."""
        self._number_of: dict[int, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, index: int) -> bool:
        return index in self._number_of

    @property
    def indices(self) -> Indices:
        """In the order of arrival; a view, which changes when somebody comes or leaves."""
        return self._indices[: len(self._numbers)]

    def enter(self, index: int) -> None:
        """A request comes."""
        end = len(self._numbers)
        if end == len(self._indices):
            self._indices = np.pad(self._indices, (0, end + 1))
        self._indices[end] = index
        self._numbers.append(self._next)
        self._number_of[index] = self._next
        self._next += 1

    def leave(self, index: int) -> int:
        """It starts or goes away; returns how many wait that came before it. Raises KeyError when it does not wait."""
        place = bisect_left(self._numbers, self._number_of.pop(index))
        end = len(self._numbers)
        del self._numbers[place]
        self._indices[place : end - 1] = self._indices[place + 1 : end]
        return place
