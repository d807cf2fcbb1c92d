"""When each request would have started, had the server served them as they came.

That is the yardstick of the bound on waiting. It is worked out beside the real queue: requests in their order of
arrival take the slot that is free first (Kiefer and Wolfowitz 1955), each for as long as it really took, or, while it
waits or runs, for as long as it is expected to take.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.jit import compiled

Array = npt.NDArray[np.float64]

RECENT = 512
"""So many settled requests are remembered."""


@compiled
def _starts(free: Array, arrival: Array, service: Array, out: Array) -> None:
    """Start times; ``free`` is a binary heap of the times when slots become free, changed as it goes."""
    slots = len(free)
    for n in range(len(arrival)):
        start = max(arrival[n], free[0])
        out[n] = start
        # Replace the smallest by the end of this service, and let it sink.
        value, at = start + service[n], 0
        while True:
            child = 2 * at + 1
            if child >= slots:
                break
            if child + 1 < slots and free[child + 1] < free[child]:
                child += 1
            if free[child] >= value:
                break
            free[at] = free[child]
            at = child
        free[at] = value


class FcfsSimulation:
    """The queue as it would have been.

    Args:
        slots: most requests that run together.

    """

    def __init__(self, slots: int) -> None:
        self._free: Array = np.full(max(1, slots), -np.inf)
        self._begin = self._end = 0
        """The requests that are not settled lie between these places, in their order of arrival."""
        self._arrival: Array = np.zeros(256)
        self._took: Array = np.zeros(256)
        """Seconds of a service that is over; NaN before."""
        self._index: npt.NDArray[np.intp] = np.zeros(256, np.intp)
        self._place: dict[int, int] = {}
        """Where the request with an index stands, counted since the server started."""
        self._dropped = 0
        self._latencies: Array = np.zeros(RECENT)
        self._num_latencies = 0

    def __len__(self) -> int:
        return self._end - self._begin

    def enter(self, index: int, arrival: float) -> None:
        """A request came; ``index`` must be unique among those that are not served."""
        if self._end == len(self._arrival):
            self._make_room()
        self._arrival[self._end], self._took[self._end], self._index[self._end] = arrival, np.nan, index
        self._place[index] = self._end + self._dropped
        self._end += 1

    def served(self, index: int, seconds: float) -> None:
        """Its service is over and took so long; 0 when it went away before."""
        place = self._place.pop(index, None)
        if place is None:
            return
        self._took[place - self._dropped] = seconds
        if place - self._dropped == self._begin:
            unknown = np.isnan(self._took[self._begin : self._end])
            settled = int(unknown.argmax()) if unknown.any() else len(unknown)
            upto = self._begin + settled
            arrival, took = self._arrival[self._begin : upto], self._took[self._begin : upto]
            start: Array = np.empty(settled)
            _starts(self._free, arrival, took, start)
            for latency in (start + took - arrival)[-RECENT:]:
                self._latencies[self._num_latencies % RECENT] = latency
                self._num_latencies += 1
            self._begin = upto

    @property
    def latencies(self) -> Array:
        """From arrival to end of the latest settled requests, in seconds."""
        return self._latencies[: min(self._num_latencies, RECENT)]

    def starts(self, expected: Array) -> tuple[npt.NDArray[np.intp], Array]:
        """When each request that is not served would have started.

        Args:
            expected: service time in seconds, by the indices of the requests.

        Returns:
            The indices and the start times, in seconds of the clock of the arrivals; in the order of arrival.

        """
        part = slice(self._begin, self._end)
        took, index = self._took[part], self._index[part]
        open_ = np.isnan(took)
        out: Array = np.empty(len(took))
        _starts(self._free.copy(), self._arrival[part], np.where(open_, expected[index], took), out)
        return index[open_], out[open_]

    def _make_room(self) -> None:
        """Forget the settled ones, and grow when that is not enough."""
        kept = slice(self._begin, self._end)
        size = max(256, 2 * (self._end - self._begin))
        for name in ("_arrival", "_took", "_index"):
            old = getattr(self, name)
            new = np.zeros(size, old.dtype)
            new[: self._end - self._begin] = old[kept]
            setattr(self, name, new)
        self._dropped += self._begin
        self._begin, self._end = 0, self._end - self._begin
