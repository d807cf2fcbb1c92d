"""The queue of waiting requests in the order of a scheduling policy, with the methods of vLLM's ``RequestQueue``.

vLLM peeks at the head of its queue, tries to find KV blocks for it, and pops it later: within one call of ``schedule``
the order must not change. So the policy is asked at the first peek of a call and its order is kept until the call ends.
While no request may start vLLM does not peek, and the policy costs no time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from vllm_instant.interfaces.requests import RequestState
from vllm_instant.interfaces.scheduling import Admission
from vllm_instant.scheduling.request_registry import LazyRequestStates

Ask = Callable[[Sequence[RequestState]], Admission]


class InstantQueue:
    """Waiting requests: preempted ones first, then the others in the policy's order.

    Args:
        ask: the policy's order of the waiting requests' states, which are given in their order of arrival.
        running: returns the number of running requests.
        has_room: whether another request may start.
        state_of: returns a request's state.
        by_priority: requests with a smaller ``priority`` go before all others.

    """

    def __init__(
        self,
        ask: Ask,
        running: Callable[[], int],
        has_room: Callable[[], bool],
        state_of: Callable[[Any], RequestState],
        by_priority: bool = False,
    ) -> None:
        self._ask, self._running, self._has_room, self._state_of = ask, running, has_room, state_of
        self._by_priority = by_priority
        self._front: deque[Any] = deque()
        self._line: dict[str, Any] = {}
        """Requests that have not started yet, by id, in the order of arrival."""
        self._states: dict[str, RequestState] = {}
        """Their states, in the same order."""
        self._arrivals: dict[str, int] = {}
        """Positions in the order of arrival by request id, kept until a request starts or is removed."""
        self._next = 0
        self._in_disorder = False
        self._order: list[Any] | None = None
        """The order of this call, the next request last; None before the policy was asked."""
        self._max_num_admitted: int | None = None
        self._scheduling = False
        self._running_before = 0

    # ------------------------------------------------------------------------------------- a call of ``schedule``

    def begin(self) -> None:
        """Begin a call of ``schedule``."""
        self._scheduling, self._order = True, None

    def end(self) -> None:
        """End the call of ``schedule``."""
        self._scheduling, self._order, self._max_num_admitted = False, None, None

    def started(self, request_id: str) -> None:
        """Note that a request runs; if it is preempted it returns to the front."""
        self._arrivals.pop(request_id, None)

    def oldest(self) -> Any:
        """The oldest request that has not started yet; None when no request waits."""
        self._sort_by_arrival()
        return next(iter(self._line.values()), None) or next(iter(self._front), None)

    def states(self) -> Sequence[RequestState]:
        """The states of requests that have not started, in the order of arrival; read them before the queue changes."""
        return LazyRequestStates(len(self._states), self._all_states)

    # ---------------------------------------------------------------------------------------- vLLM's methods

    def add_request(self, request: Any) -> None:
        """Add a new request."""
        request_id = request.request_id
        if request_id not in self._arrivals:
            if request.num_preemptions:
                # It has run before: the turn of a streaming session that ended while the request was preempted.
                self._front.append(request)
                self._order = None
                return
            self._next += 1
            self._arrivals[request_id] = self._next
        elif self._arrivals[request_id] != self._next:
            self._in_disorder = True
        self._line[request_id], self._states[request_id] = request, self._state_of(request)
        self._order = None

    def prepend_request(self, request: Any) -> None:
        """Put a preempted request to the front, and a request that vLLM skipped back to its old position."""
        if request.request_id not in self._arrivals:
            self._front.appendleft(request)
            self._order = None
        else:
            self._in_disorder = True
            self.add_request(request)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        """Put several requests back, the last one nearest to the front."""
        for request in requests:
            self.prepend_request(request)

    def peek_request(self) -> Any:
        """The request that starts next; raises IndexError when no request waits."""
        order = self._order_now()
        if not order:
            raise IndexError("peek from an empty queue")
        return order[-1]

    def pop_request(self) -> Any:
        """Remove and return the request that starts next; raises IndexError when no request waits."""
        order = self._order_now()
        if not order:
            raise IndexError("pop from an empty queue")
        request = order.pop()
        self._take_off(request)
        return request

    def remove_request(self, request: Any) -> None:
        """Remove a request; raises ValueError when it does not wait here."""
        if request.request_id not in self._line and request not in self._front:
            raise ValueError(f"request {request.request_id} does not wait")
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Any]) -> None:
        """Remove the given requests that wait here."""
        for request in requests:
            self._take_off(request)
            self._arrivals.pop(request.request_id, None)
        self._order = None

    def __bool__(self) -> bool:
        if not (self._line or self._front):
            return False
        if self._scheduling and self._has_room():
            if self._order is None:
                self._running_before = self._running()
                self._order_now()
            # The queue looks empty to vLLM once the policy's limit of admissions is reached.
            return self._max_num_admitted is None or self._running() - self._running_before < self._max_num_admitted
        return True

    def __len__(self) -> int:
        return len(self._line) + len(self._front)

    def __iter__(self) -> Iterator[Any]:
        if self._by_priority:
            return reversed(self._sorted(Admission()))
        self._sort_by_arrival()
        return iter([*self._front, *self._line.values()])

    # ------------------------------------------------------------------------------------------------ inside

    def _all_states(self) -> list[RequestState]:
        self._sort_by_arrival()
        return list(self._states.values())

    def _take_off(self, request: Any) -> None:
        if self._line.pop(request.request_id, None) is not None:
            del self._states[request.request_id]
        elif request in self._front:
            self._front.remove(request)

    def _sort_by_arrival(self) -> None:
        if self._in_disorder:
            place = self._arrivals.__getitem__
            ids = sorted(self._line, key=place)
            self._line = {request_id: self._line[request_id] for request_id in ids}
            self._states = {request_id: self._states[request_id] for request_id in ids}
            self._in_disorder = False

    def _order_now(self) -> list[Any]:
        if self._order is None:
            admission = self._ask(self.states()) if self._scheduling and self._line else Admission()
            self._max_num_admitted = admission.max_num_admitted
            self._order = self._sorted(admission)
        elif not self._order and (self._line or self._front):
            # All requests that the policy named have started: the others follow in the order of arrival.
            self._order = self._sorted(Admission())
        return self._order

    def _named(self, admission: Admission) -> list[Any]:
        if admission.request_ids:
            return [self._line[request_id] for request_id in admission.request_ids if request_id in self._line]
        if not len(admission.order):
            return []
        line = list(self._line.values())
        return [line[place] for place in admission.order]

    def _sorted(self, admission: Admission) -> list[Any]:
        """The requests in the order of admission, the next one last; unnamed ones only if there are priorities."""
        self._sort_by_arrival()
        line = self._named(admission)
        if not line:
            line = list(self._line.values())
        elif self._by_priority and len(line) < len(self._line):
            named = {request.request_id for request in line}
            line += [request for request_id, request in self._line.items() if request_id not in named]
        first = [*self._front, *line]
        if self._by_priority:
            first.sort(key=lambda request: request.priority)
        first.reverse()
        return first
