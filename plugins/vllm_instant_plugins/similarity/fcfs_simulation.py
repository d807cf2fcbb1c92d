"""A simulation of first come, first served (FCFS) beside the real queue: when each request would have started.

It is the reference of the bound on waiting. In order of arrival each request takes the server that becomes free first
(Kiefer and Wolfowitz 1955, with ``max_num_seqs`` servers) for its measured service time, or, while it waits or runs,
for its predicted one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.jit import compiled

Array = npt.NDArray[np.float64]

MAX_LATENCIES = 512
"""Number of latest settled requests whose simulated latency is kept."""


@compiled
def _simulate(free: Array, arrival: Array, service: Array, out: Array) -> None:
    """Write start times into ``out``; ``free`` is a binary min-heap of the times at which servers become free."""
    num_servers = len(free)
    for n in range(len(arrival)):
        start = max(arrival[n], free[0])
        out[n] = start
        # Replace the root by the end of this service and sift it down (heapreplace).
        value, at = start + service[n], 0
        while True:
            child = 2 * at + 1
            if child >= num_servers:
                break
            if child + 1 < num_servers and free[child + 1] < free[child]:
                child += 1
            if free[child] >= value:
                break
            free[at] = free[child]
            at = child
        free[at] = value


class FcfsSimulation:
    """The simulated queue. A request is settled once its own and all earlier service times are measured.

    Args:
        max_num_seqs: maximum number of requests that run at once.

    """

    def __init__(self, max_num_seqs: int) -> None:
        self._free: Array = np.full(max(1, max_num_seqs), -np.inf)
        self._begin = self._end = 0
        """Rows of the requests that are not settled, in order of arrival."""
        self._arrival: Array = np.zeros(256)
        self._service: Array = np.zeros(256)
        """Measured service time in seconds; NaN until it is known."""
        self._index: npt.NDArray[np.intp] = np.zeros(256, np.intp)
        self._position: dict[int, int] = {}
        """Position of the request with an index, counted from the first request of the server."""
        self._num_dropped = 0
        self._latencies: Array = np.zeros(MAX_LATENCIES)
        self._num_latencies = 0

    def __len__(self) -> int:
        return self._end - self._begin

    def add(self, index: int, arrival: float) -> None:
        """Append a request; ``index`` must be unique among the requests without a measured service time."""
        if self._end == len(self._arrival):
            self._make_room()
        self._arrival[self._end], self._service[self._end], self._index[self._end] = arrival, np.nan, index
        self._position[index] = self._end + self._num_dropped
        self._end += 1

    def set_service_time(self, index: int, seconds: float) -> None:
        """The measured service time of a request; 0 for a request that left without starting."""
        position = self._position.pop(index, None)
        if position is None:
            return
        row = position - self._num_dropped
        self._service[row] = seconds
        if row == self._begin:
            self._settle()

    def _settle(self) -> None:
        """Advance the servers over the leading requests whose service times are all known."""
        unknown = np.isnan(self._service[self._begin : self._end])
        num_settled = int(unknown.argmax()) if unknown.any() else len(unknown)
        end = self._begin + num_settled
        arrival, service = self._arrival[self._begin : end], self._service[self._begin : end]
        start: Array = np.empty(num_settled)
        _simulate(self._free, arrival, service, start)
        for latency in (start + service - arrival)[-MAX_LATENCIES:]:
            self._latencies[self._num_latencies % MAX_LATENCIES] = latency
            self._num_latencies += 1
        self._begin = end

    @property
    def latencies(self) -> Array:
        """Simulated seconds from arrival to end of the latest settled requests."""
        return self._latencies[: min(self._num_latencies, MAX_LATENCIES)]

    def starts(self, predicted: Array) -> tuple[npt.NDArray[np.intp], Array]:
        """Simulated start times of the requests without a measured service time.

        Args:
            predicted: service times in seconds, by the indices of the requests.

        Returns:
            The indices and the start times in order of arrival, on the clock of the arrivals.

        """
        rows = slice(self._begin, self._end)
        service, index = self._service[rows], self._index[rows]
        unknown = np.isnan(service)
        out: Array = np.empty(len(service))
        _simulate(self._free.copy(), self._arrival[rows], np.where(unknown, predicted[index], service), out)
        return index[unknown], out[unknown]

    def _make_room(self) -> None:
        """Drop the settled requests and grow if more than half of the rows are still needed."""
        rows = slice(self._begin, self._end)
        count = self._end - self._begin
        for name in ("_arrival", "_service", "_index"):
            old = getattr(self, name)
            new = np.zeros(max(256, 2 * count), old.dtype)
            new[:count] = old[rows]
            setattr(self, name, new)
        self._num_dropped += self._begin
        self._begin, self._end = 0, count
