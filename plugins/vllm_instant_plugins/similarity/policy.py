"""The ``similarity`` scheduling policy: shortest predicted job first with bounded waits.

Waiting requests are sorted into bins of similar predicted service time (prompt tokens and predicted output tokens).
Cheap bins go first, which minimises the mean wait (Smith 1956). The cost of a request is discounted as it uses up its
patience, which is its simulated wait under first come, first served (``fcfs_simulation``) times ``wait_ratio`` plus
``wait_seconds``: short requests overtake a long one for a bounded time only.

Predicting, learning, the simulation and sorting the head of the queue run in ``background_work``, while the model
executes. ``admit`` then reads request ids from a list; its cost does not depend on the number of waiting requests.
"""

from __future__ import annotations

import logging
import operator
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from vllm_instant import Admission, RequestState, SchedulerSnapshot, SchedulingPolicy
from vllm_instant_plugins.similarity.cost_model import LinearCostModel
from vllm_instant_plugins.similarity.fcfs_simulation import FcfsSimulation
from vllm_instant_plugins.similarity.output_length_predictor import OutputLengthPredictor, PendingObservation
from vllm_instant_plugins.similarity.request_table import Array, RequestTable, hinted_tokens
from vllm_instant_plugins.similarity.waiting_list import MIN_PATIENCE, Indices, WaitingList, by_priority
from vllm_instant_plugins.state_store import PersistentState

logger = logging.getLogger("vllm.instant")

BINS_PER_OCTAVE = 2
SECONDS_PER_TOKEN = 0.03
SECONDS_PER_PROMPT_TOKEN = 0.001
MAX_ORDER_AGE_SECONDS = 0.1
"""Age at which deadlines and the order are recomputed in ``admit``."""
ORDER_INTERVAL_SECONDS = 0.05
"""Interval at which deadlines and the order are recomputed in ``background_work``."""
NUM_CANDIDATES = 128
"""Requests sorted in ``background_work``: far more than can start before the order is recomputed."""
PREDICTION_INTERVAL_SECONDS = 0.5
"""Interval after which waiting requests are predicted again if the predictor has changed."""
NUM_EXTRA_CANDIDATES = 16
"""Requests named beyond the free places: vLLM may skip some."""
GUARD_SECONDS = 5.0
GUARD_TOKENS = 64.0
"""For ``GUARD_SECONDS`` after a preemption no request starts unless the free KV blocks hold ``GUARD_TOKENS`` further
tokens per running request."""
SAVE_INTERVAL_SECONDS = 60.0
TAIL_QUANTILE = 0.97
"""Quantile of the FCFS latencies beyond which a request must not become slower."""
MAX_TAIL_GROWTH = 0.3
"""Relative growth of that quantile which is allowed at high load; without it long requests could not be moved."""
MIN_TAIL_OBSERVATIONS = 100
BOUND_MARGIN = 0.85
"""Fraction of the bound that is used: a place becomes free some time after the deadline, and service times are
estimates."""

_index_of = operator.attrgetter("index")


def _indices(states: Sequence[RequestState]) -> Indices:
    return np.fromiter(map(_index_of, states), np.intp, len(states))


class SimilarityPolicy(SchedulingPolicy):
    """Orders the queue by predicted cost and remaining patience.

    Args:
        max_num_seqs: maximum number of requests that run at once.
        wait_ratio: upper bound on a request's wait as a multiple of its wait under first come, first served.
        wait_seconds: seconds added to that bound.
        store: where learned output lengths are kept; None to forget them.
        clock: monotonic time in seconds.

    """

    def __init__(
        self,
        max_num_seqs: int,
        wait_ratio: float = 2.0,
        wait_seconds: float = 1.0,
        store: PersistentState | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.length_predictor = OutputLengthPredictor(max_num_seqs)
        self.service_time = LinearCostModel([0.0, SECONDS_PER_PROMPT_TOKEN, SECONDS_PER_TOKEN])
        """Seconds from start to end of a request: constant, per prompt token, per output token."""
        self._table = RequestTable(max(64, 2 * max_num_seqs))
        self._fcfs = FcfsSimulation(max_num_seqs)
        self._wait_ratio, self._wait_seconds = wait_ratio, wait_seconds
        self._store = store
        self._saved_at, self._num_saved = clock(), 0
        self._live: dict[int, RequestState] = {}
        self._waiting = WaitingList(max(64, 2 * max_num_seqs))
        self._new: dict[int, RequestState] = {}
        """Waiting requests that are not in the table yet."""
        self._pending_starts: list[tuple[RequestState, float, int]] = []
        """Starts that are not in the table yet: request, time, number of older requests that waited."""
        self._pending_ends: list[tuple[RequestState, float, bool]] = []
        """Ends that are not in the table yet: request, time, whether it was complete."""
        self._to_learn: list[tuple[PendingObservation, int, int, float]] = []
        """Complete requests to learn from: observation, output tokens, prompt tokens, seconds."""
        self._starts: deque[dict[str, Any]] = deque(maxlen=512)
        self._start_of: dict[int, dict[str, Any]] = {}
        self._order: dict[int, None] = {}
        """Indices of the waiting requests that may start soon, in the order in which they should."""
        self._ordered_at = self._deadlines_at = self._predicted_at = -np.inf
        self._num_learned_at_prediction = 0
        self._preempted_at = -np.inf
        if store is not None:
            self._restore(store, max_num_seqs)

    # ---------------------------------------------------------------------------------------------- requests

    def enter(self, request: RequestState) -> None:
        """Append the request to the waiting list; the table is filled in the background."""
        index = request.index
        self._live[index] = self._new[index] = request
        self._waiting.add(index)

    def started(self, request: RequestState, now: float) -> None:
        """Remove the request from the waiting list; later starts of the same request are ignored."""
        if request.index in self._waiting:
            self._pending_starts.append((request, now, self._leave_queue(request.index)))

    def preempted(self, request: RequestState, now: float) -> None:
        """KV blocks ran out: admissions are guarded for ``GUARD_SECONDS``."""
        self._preempted_at = now

    def finished(self, request: RequestState, now: float, complete: bool) -> None:
        """Keep the outcome, to be learned from in the background."""
        index = request.index
        if self._live.pop(index, None) is None:
            return
        if index in self._waiting:
            self._leave_queue(index)
        if self._pending_starts or index in self._new:
            self._update_table()
        self._pending_ends.append((request, now, complete))

    def _leave_queue(self, index: int) -> int:
        self._order.pop(index, None)
        return self._waiting.remove(index)

    def _update_table(self) -> list[int]:
        """Apply pending ends, entries and starts; returns the indices of the new requests.

        Ends come first because a new request may have taken over the index of an ended one.
        """
        for request, now, complete in self._pending_ends:
            self._record_end(request, now, complete)
        self._pending_ends.clear()
        added = list(self._new)
        for request in self._new.values():
            self._table.add(request, self._wait_seconds)
            self._fcfs.add(request.index, request.arrival_time)
            self.length_predictor.add(request)
        self._new.clear()
        if added:
            self._predict(np.array(added))
        for request, now, num_older_waiting in self._pending_starts:
            self._record_start(request, now, num_older_waiting)
        self._pending_starts.clear()
        return added

    def _record_start(self, request: RequestState, now: float, num_older_waiting: int) -> None:
        index, table = request.index, self._table
        table.started[index] = now
        arrival = table.arrival[index]
        has_prediction = self.length_predictor.useful or not np.isnan(table.hinted_tokens[index])
        start = {
            "request_id": request.request_id,
            "waited_ms": 1e3 * float(now - arrival),
            "bound_ms": 1e3 * float(table.deadline[index] - arrival) / BOUND_MARGIN if has_prediction else None,
            "expected_tokens": float(table.predicted_tokens[index]),
            "tokens": None,
            "older_waiting": num_older_waiting,
        }
        self._starts.append(start)
        self._start_of[index] = start

    def _record_end(self, request: RequestState, now: float, complete: bool) -> None:
        index = request.index
        start = self._start_of.pop(index, None)
        if start is not None:
            start["tokens"] = request.num_output_tokens
        started = self._table.started[index]
        seconds = 0.0 if np.isnan(started) else float(now - started)
        self._fcfs.set_service_time(index, seconds)
        observation = self.length_predictor.remove(index)
        if complete and seconds > 0 and observation is not None:
            self._to_learn.append((observation, request.num_output_tokens, request.num_prompt_tokens, seconds))

    # ------------------------------------------------------------------------------------- learning and predicting

    def background_work(self, snapshot: SchedulerSnapshot) -> None:
        """Learn from ended requests, predict new ones, and recompute deadlines and the order of the queue."""
        added = [index for index in self._update_table() if index in self._waiting]
        self._learn()
        if self._store is not None and snapshot.now - self._saved_at > SAVE_INTERVAL_SECONDS:
            self._saved_at, self._num_saved = snapshot.now, self.length_predictor.num_observed
            self._store.save_in_background(self._state())
        if not len(self._waiting):
            return
        self._predict_again(snapshot.now)
        # The order is computed for the end of its interval, so that it includes requests overdue by then.
        soon = snapshot.now + ORDER_INTERVAL_SECONDS
        if snapshot.now - self._deadlines_at >= ORDER_INTERVAL_SECONDS:
            self._update_deadlines(snapshot)
            self._update_order(self._waiting.indices, soon, NUM_CANDIDATES)
        elif added:
            self._update_order(np.array([*self._order, *added]), soon, NUM_CANDIDATES)

    def _learn(self) -> None:
        for observation, num_tokens, num_prompt_tokens, seconds in self._to_learn:
            self.service_time.observe(seconds, 1.0, num_prompt_tokens, num_tokens)
            self.length_predictor.learn(observation, num_tokens)
        self._to_learn.clear()

    def _predict_again(self, now: float) -> None:
        """Update the predictions of all live requests if the predictor has learned since."""
        num_observed = self.length_predictor.num_observed
        due = now - self._predicted_at >= PREDICTION_INTERVAL_SECONDS
        if due and num_observed != self._num_learned_at_prediction:
            self._predicted_at, self._num_learned_at_prediction = now, num_observed
            self.length_predictor.refresh(np.fromiter(self._live, np.intp, len(self._live)))
            self._predict(self._waiting.indices)

    def _predict(self, waiting: Indices) -> None:
        """Store predicted output tokens and the cost of the bin, within which requests keep the order of arrival."""
        table = self._table
        table.predicted_tokens[waiting] = self._remaining_tokens(waiting, np.zeros(len(waiting)))
        # A bin is 1 / BINS_PER_OCTAVE octave wide in prompt tokens and in output tokens; its centre stands for it.
        prompt_tokens, output_tokens = (
            np.exp2(np.round(np.log2(np.maximum(counts[waiting], 1.0)) * BINS_PER_OCTAVE) / BINS_PER_OCTAVE)
            for counts in (table.prompt_tokens, table.predicted_tokens)
        )
        table.bin_cost[waiting] = self._service_seconds(prompt_tokens, output_tokens)

    def _update_deadlines(self, snapshot: SchedulerSnapshot) -> None:
        """Compute the time by which each waiting request should have started."""
        self._deadlines_at = snapshot.now
        table = self._table
        service = self._predicted_service(snapshot)
        indices, fcfs_starts = self._fcfs.starts(service)
        arrival = table.arrival[indices]
        fcfs_wait = np.maximum(fcfs_starts - arrival, 0.0)
        patience = BOUND_MARGIN * (self._wait_ratio * fcfs_wait + self._wait_seconds)
        latency = np.concatenate([self._fcfs.latencies, fcfs_wait + service[indices]])
        if len(latency) >= MIN_TAIL_OBSERVATIONS:
            # Keep the tail of the latencies: start + service must stay below the FCFS quantile, unless FCFS itself
            # would have exceeded it. The quantile may grow with the load (mean wait / mean service time).
            rank = len(latency) - 1 - int((1 - TAIL_QUANTILE) * len(latency))
            load = min(1.0, float(fcfs_wait.mean()) / max(float(service[indices].mean()), 1e-6))
            max_latency = np.partition(latency, rank)[rank] * (1 + MAX_TAIL_GROWTH * load**2)
            patience = np.minimum(patience, np.maximum(fcfs_wait, max_latency - service[indices]))
        table.deadline[indices] = arrival + np.maximum(patience, MIN_PATIENCE)

    def _predicted_service(self, snapshot: SchedulerSnapshot) -> Array:
        """Predicted seconds from start to end of waiting and running requests, by index."""
        table = self._table
        waiting, running = self._known_waiting(), _indices(snapshot.running)
        service = np.zeros(len(table))
        service[waiting] = self._service_seconds(table.prompt_tokens[waiting], table.predicted_tokens[waiting])
        if len(running):
            done = np.fromiter((state.num_output_tokens for state in snapshot.running), float, len(running))
            elapsed = np.nan_to_num(snapshot.now - table.started[running])
            remaining = self._remaining_tokens(running, done)
            service[running] = elapsed + self._service_seconds(np.zeros(len(running)), remaining)
        return service

    def _remaining_tokens(self, indices: Indices, done: Array) -> Array:
        """Predicted further output tokens: by the client's hint if there is one, else by the learned distribution."""
        hint = self._table.hinted_tokens[indices]
        learned = self.length_predictor.remaining(indices, done)
        return np.asarray(np.where(np.isnan(hint), learned, np.maximum(hint - done, 1.0)))

    def _service_seconds(self, prompt_tokens: Array, output_tokens: Array) -> Array:
        # Without the constant term: it is the same for all requests.
        _, per_prompt_token, per_output_token = self.service_time.coefficients
        seconds: Array = per_prompt_token * prompt_tokens + per_output_token * output_tokens
        return np.maximum(seconds, 1e-4)

    # ---------------------------------------------------------------------------------------------- the queue

    def admit(self, snapshot: SchedulerSnapshot) -> Admission:
        """The order by cost and patience; first come, first served until output lengths are known or hinted."""
        max_num_admitted, waiting = self._max_num_admitted(snapshot), self._waiting.indices
        if not self.length_predictor.useful and not self._any_hint():
            return Admission(max_num_admitted=max_num_admitted)
        num_places = max(0, snapshot.max_num_running - len(snapshot.running))
        # The engine may hold back requests of the waiting list; name enough others.
        num_held_back = max(0, len(waiting) - len(snapshot.waiting))
        needed = num_places + NUM_EXTRA_CANDIDATES + num_held_back
        order_age = snapshot.now - self._ordered_at
        if len(self._order) < min(needed, len(waiting)) or order_age > MAX_ORDER_AGE_SECONDS:
            # New requests are at the end of the list. If older ones can fill all places, the new ones are left to
            # background_work.
            if self._pending_starts or len(self._known_waiting()) < needed:
                self._update_table()
            if snapshot.now - self._deadlines_at > MAX_ORDER_AGE_SECONDS:
                self._update_deadlines(snapshot)
            self._update_order(self._known_waiting(), snapshot.now, max(needed, NUM_CANDIDATES))
        by_id = [self._live[index].request_id for index in islice(self._order, needed)]
        return Admission(max_num_admitted=max_num_admitted, request_ids=by_id)

    def _any_hint(self) -> bool:
        """Whether the client of any waiting request sent its output length."""
        if not np.isnan(self._table.hinted_tokens[self._known_waiting()]).all():
            return True
        return any(not np.isnan(hinted_tokens(request)) for request in self._new.values())

    def _known_waiting(self) -> Indices:
        """Waiting requests that are in the table, in order of arrival; new ones are at the end of the list."""
        return self._waiting.indices[: len(self._waiting) - sum(index in self._waiting for index in self._new)]

    def _update_order(self, indices: Indices, now: float, limit: int) -> None:
        self._ordered_at = now
        self._order = dict.fromkeys(by_priority(self._table, indices, now, limit))

    def _max_num_admitted(self, snapshot: SchedulerSnapshot) -> int | None:
        """After a preemption 0 or 1, by whether the running requests have room for ``GUARD_TOKENS`` each."""
        if snapshot.now - self._preempted_at > GUARD_SECONDS or not snapshot.running:
            return None
        return 0 if snapshot.free_kv_tokens < GUARD_TOKENS * len(snapshot.running) else 1

    def preemption_order(self, running: Sequence[RequestState]) -> Sequence[int] | None:
        """Indices of the running requests by recomputation per token still to come; the last is preempted first.

        A preempted request recomputes its whole context; in return its blocks are free for its remaining tokens.
        Each earlier preemption multiplies its weight by 4.
        """
        self._update_table()
        indices = _indices(running)
        done = np.array([state.num_output_tokens for state in running], float)
        remaining = self._remaining_tokens(indices, done)
        num_preemptions = np.array([state.num_preemptions for state in running])
        recomputation = (self._table.prompt_tokens[indices] + done) * 4.0**num_preemptions
        return [int(place) for place in np.argsort(-recomputation / remaining, kind="stable")]

    # ------------------------------------------------------------------------------------ reporting and saving

    def metrics(self) -> Mapping[str, float]:
        """Metrics for ``/metrics``."""
        return {
            "finished_requests_learned": float(self.length_predictor.num_observed),
            "output_length_calibration_error": self.length_predictor.calibration_error,
            "seconds_per_output_token": float(self.service_time.coefficients[2]),
        }

    def decisions(self, last: int, request_id: str | None = None) -> Sequence[Mapping[str, Any]]:
        """The newest starts in order of time."""
        self._update_table()
        starts = [s for s in self._starts if request_id is None or s["request_id"].startswith(request_id)]
        return starts[-last:]

    def close(self) -> None:
        """Save what was learned."""
        self._update_table()
        self._learn()
        if self._store is not None and self.length_predictor.num_observed != self._num_saved:
            self._store.save(self._state())

    def _state(self) -> dict[str, object]:
        return {"lengths": self.length_predictor.state(), "service": self.service_time.coefficients.tolist()}

    def _restore(self, store: PersistentState, max_num_seqs: int) -> None:
        state = store.load()
        if state is None:
            return
        try:
            self.length_predictor.restore(state["lengths"])
            self.service_time.coefficients[:] = state["service"]
        except Exception as error:  # whatever the file holds, the server must start
            logger.warning("Saved output lengths do not fit this release and are ignored: %s", error)
            self.length_predictor = OutputLengthPredictor(max_num_seqs)
        self._num_saved = self.length_predictor.num_observed
