"""The waiting requests in order of arrival, and the priority in which they should start."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.similarity.request_table import Array, RequestTable

Indices = npt.NDArray[np.intp]

IMPATIENCE = 1.5
"""Exponent on the remaining fraction of a request's patience, by which its cost is weighted. Smaller values exceed the
bound for some requests, larger ones lose part of the gain of short requests (simulated in
``tests/plugins/similarity``)."""
MIN_PATIENCE = 1e-3
"""Seconds."""


class WaitingList:
    """The waiting requests by ``RequestState.index``, as an array that is updated in place.

    Args:
        size: initial capacity; the list grows as needed.

    """

    def __init__(self, size: int) -> None:
        self._indices: Indices = np.zeros(size, np.intp)
        self._serials: list[int] = []
        """Serial numbers of the same requests, in order of arrival and therefore sorted."""
        self._serial_of: dict[int, int] = {}
        self._next_serial = 0

    def __len__(self) -> int:
        return len(self._serials)

    def __contains__(self, index: int) -> bool:
        return index in self._serial_of

    @property
    def indices(self) -> Indices:
        """The indices in order of arrival; a view that changes when a request is added or removed."""
        return self._indices[: len(self._serials)]

    def add(self, index: int) -> None:
        """Append a request."""
        end = len(self._serials)
        if end == len(self._indices):
            self._indices = np.pad(self._indices, (0, end + 1))
        self._indices[end] = index
        self._serials.append(self._next_serial)
        self._serial_of[index] = self._next_serial
        self._next_serial += 1

    def remove(self, index: int) -> int:
        """Remove a request and return the number of waiting requests that arrived before it.

        Raises:
            KeyError: if the request is not waiting.

        """
        place = bisect_left(self._serials, self._serial_of.pop(index))
        end = len(self._serials)
        del self._serials[place]
        self._indices[place : end - 1] = self._indices[place + 1 : end]
        return place


def by_priority(table: RequestTable, indices: Indices, now: float, limit: int) -> list[int]:
    """The first ``limit`` of the requests ``indices`` in the order in which they should start.

    Ties keep the order of ``indices``. ``now`` is the time for which the order is made.
    """
    cost, arrival, deadline = table.bin_cost[indices], table.arrival[indices], table.deadline[indices]
    remaining_patience = (deadline - now) / np.maximum(deadline - arrival, MIN_PATIENCE)
    # Overdue requests get a weight below zero: they precede all others, the most overdue first.
    weight = np.where(remaining_patience > 0, cost * np.abs(remaining_patience) ** IMPATIENCE, remaining_patience)
    if limit < len(weight):
        first = np.argpartition(weight, limit)[:limit]
        first.sort()
        indices, weight = indices[first], weight[first]
    order = np.argsort(weight, kind="stable")
    return _group_by_prefix(table, indices[order], int((weight <= 0).sum()))


def _group_by_prefix(table: RequestTable, order: Indices, num_overdue: int) -> list[int]:
    """Move requests of one bin that share a long prefix directly behind the first of them.

    They find the prefix in the cache then, before it is evicted. No request moves ahead of the first ``num_overdue``.
    """
    prefix: npt.NDArray[np.int64] = table.prefix_group[order]
    indices: list[int] = order.tolist()
    # The last overdue request may be followed by requests of its own group.
    num_fixed = max(0, num_overdue - 1)
    if not prefix[num_fixed:].any():
        return indices
    cost: Array = table.bin_cost[order]
    groups: dict[object, list[int]] = {}
    for place, (index, shared, bin_cost) in enumerate(zip(indices, prefix.tolist(), cost.tolist(), strict=True)):
        key: object = (shared, bin_cost) if shared and place >= num_fixed else (place,)
        groups.setdefault(key, []).append(index)
    return [index for group in groups.values() for index in group]
