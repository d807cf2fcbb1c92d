"""The ``similarity`` policy: short and alike first, nobody much later than as they came.

Waiting requests are sorted into bins by what they will cost: their prompt and the answer that is expected
(``lengths``). Cheap bins go first, which is what lowers the mean wait most (Smith 1956); what a bin costs is worth less
the more of its patience a request has used up, and its patience is what it would have waited had everybody been served
as they came (``first_come``), times ``wait_ratio``, plus ``wait_seconds``. So a long request is passed by the short
ones for a while, and not for ever.

Whatever takes long (foretelling, learning, the other queue, and the order of those that may be first soon) is done in
``background_work``, while the model runs. ``admit`` reads names from a list then, however many wait.
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
from vllm_instant_plugins.similarity.cost_model import LinearTime
from vllm_instant_plugins.similarity.fcfs_simulation import FcfsSimulation
from vllm_instant_plugins.similarity.output_length_predictor import LengthPredictor, PendingObservation
from vllm_instant_plugins.similarity.priority import MIN_PATIENCE, ranked
from vllm_instant_plugins.similarity.request_table import Array, Ledger, told_tokens
from vllm_instant_plugins.similarity.waiting_list import Indices, Line
from vllm_instant_plugins.state_store import PersistentState

logger = logging.getLogger("vllm.instant")

BINS_PER_OCTAVE = 2
SECONDS_PER_TOKEN = 0.03
SECONDS_PER_PROMPT_TOKEN = 0.001
STALE_SECONDS = 0.1
"""Patience and order are worked out again after so long at the latest,"""
RENEW_SECONDS = 0.05
"""and after so long when the model leaves time for it."""
CANDIDATES = 128
"""So many are put in order meanwhile: many more than can start until the order is worked out again."""
FORETOLD_SECONDS = 0.5
"""What was foretold of those that wait is foretold again after so long, if something was learned."""
MORE_THAN_PLACES = 16
"""So many more are put in order than there are places: vLLM may pass over some."""
GUARD_SECONDS = 5.0
GUARD_TOKENS = 64.0
"""For so long after somebody lost KV blocks, nobody starts unless all that run can say so many tokens more."""
SAVE_SECONDS = 60.0
TAIL_QUANTILE = 0.97
"""Latencies beyond this quantile of first come, first served are the tail, which shall not become longer."""
TAIL_GIVES = 0.3
"""In a crowd it may, by up to this share: without, nothing could be moved there (simulated, as above)."""
ENOUGH_FOR_A_TAIL = 100
MARGIN = 0.85
"""Share of the bound that is used: a place becomes free a little after somebody is due, and services are estimates."""

_index_of = operator.attrgetter("index")


def _indices(states: Sequence[RequestState]) -> Indices:
    return np.fromiter(map(_index_of, states), np.intp, len(states))


class SimilarityPolicy(SchedulingPolicy):
    """Orders the queue by expected cost with bounded patience.

    Args:
        slots: most requests that run together.
        wait_ratio: a request waits at most so many times what it would have waited as they came,
        wait_seconds: and so many seconds more.
        store: keeps what was learned about lengths, if anything shall.
        clock: seconds, monotonic.

    """

    def __init__(
        self,
        slots: int,
        wait_ratio: float = 2.0,
        wait_seconds: float = 1.0,
        store: PersistentState | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lengths = LengthPredictor(slots)
        self.service = LinearTime([0.0, SECONDS_PER_PROMPT_TOKEN, SECONDS_PER_TOKEN])
        """Seconds of a request's stay: constant, for each prompt token, for each output token."""
        self._ledger = Ledger(max(64, 2 * slots))
        self._as_they_came = FcfsSimulation(slots)
        self._ratio, self._seconds = wait_ratio, wait_seconds
        self._store = store
        self._saved_at, self._saved = clock(), 0
        self._live: dict[int, RequestState] = {}
        self._line = Line(max(64, 2 * slots))
        """Those that have not started."""
        self._new: dict[int, RequestState] = {}
        """Came, and were not written down yet."""
        self._just_started: list[tuple[RequestState, float, int]] = []
        """When, and how many waited that had come before; not written down yet, either."""
        self._just_ended: list[tuple[RequestState, float, bool]] = []
        """When, and whether by themselves."""
        self._ended: list[tuple[PendingObservation, int, int, float]] = []
        """Ended by themselves, to be learned from: output tokens, prompt tokens, seconds."""
        self._starts: deque[dict[str, Any]] = deque(maxlen=512)
        self._start_of: dict[int, dict[str, Any]] = {}
        self._ranking: dict[int, None] = {}
        """Indices of those that wait and may be first soon, those first that go first."""
        self._ranked_at = self._patience_at = self._foretold_at = -np.inf
        self._foretold_from = 0
        self._preempted_at = -np.inf
        if store is not None:
            self._restore(store, slots)

    # ---------------------------------------------------------------------------------------------- requests

    def enter(self, request: RequestState) -> None:
        """It takes its place in line; the rest when there is time."""
        index = request.index
        self._live[index] = self._new[index] = request
        self._line.enter(index)

    def started(self, request: RequestState, now: float) -> None:
        """It waited so long; the first start counts."""
        if request.index in self._line:
            self._just_started.append((request, now, self._leave_line(request.index)))

    def preempted(self, request: RequestState, now: float) -> None:
        """KV blocks ran out: for a while nobody starts who would make them run out again."""
        self._preempted_at = now

    def finished(self, request: RequestState, now: float, complete: bool) -> None:
        """Keep what there is to learn of it, for when there is time."""
        index = request.index
        if self._live.pop(index, None) is None:
            return
        if index in self._line:
            self._leave_line(index)
        if self._just_started or index in self._new:
            self._catch_up()
        self._just_ended.append((request, now, complete))

    def _leave_line(self, index: int) -> int:
        self._ranking.pop(index, None)
        return self._line.leave(index)

    def _catch_up(self) -> list[int]:
        """Write down what happened, the ends first: their indices may be others' now. Returns who came."""
        for request, now, complete in self._just_ended:
            self._write_down_end(request, now, complete)
        self._just_ended.clear()
        newcomers = list(self._new)
        for request in self._new.values():
            self._ledger.enter(request, self._seconds)
            self._as_they_came.enter(request.index, request.arrival)
            self.lengths.enter(request)
        self._new.clear()
        if newcomers:
            self._expect(np.array(newcomers))
        for request, now, older_waiting in self._just_started:
            self._write_down_start(request, now, older_waiting)
        self._just_started.clear()
        return newcomers

    def _write_down_start(self, request: RequestState, now: float, older_waiting: int) -> None:
        index, ledger = request.index, self._ledger
        ledger.started[index] = now
        arrival = ledger.arrival[index]
        start = {
            "request_id": request.request_id,
            "waited_ms": 1e3 * float(now - arrival),
            "bound_ms": 1e3 * float(ledger.due[index] - arrival) / MARGIN if self._acts_on(index) else None,
            "expected_tokens": float(ledger.tokens[index]),
            "tokens": None,
            "older_waiting": older_waiting,
        }
        self._starts.append(start)
        self._start_of[index] = start

    def _write_down_end(self, request: RequestState, now: float, complete: bool) -> None:
        index = request.index
        start = self._start_of.pop(index, None)
        if start is not None:
            start["tokens"] = request.num_output_tokens
        started = self._ledger.started[index]
        seconds = 0.0 if np.isnan(started) else float(now - started)
        self._as_they_came.served(index, seconds)
        ticket = self.lengths.release(index)
        if complete and seconds > 0 and ticket is not None:
            self._ended.append((ticket, request.num_output_tokens, request.num_prompt_tokens, seconds))

    # ---------------------------------------------------------------------------------------------- thinking

    def background_work(self, moment: SchedulerSnapshot) -> None:
        """Learn from those that ended, foretell those that came, and work out everybody's patience."""
        newcomers = [index for index in self._catch_up() if index in self._line]
        self._learn()
        if self._store is not None and moment.now - self._saved_at > SAVE_SECONDS:
            self._saved_at, self._saved = moment.now, self.lengths.observed
            self._store.save_aside(self._kept())
        if not len(self._line):
            return
        self._foretell_again(moment.now)
        # The order is for when it will be used: whoever becomes due until then is among the first already.
        soon = moment.now + RENEW_SECONDS
        if moment.now - self._patience_at >= RENEW_SECONDS:
            self._work_out_patience(moment)
            self._rank(self._line.indices, soon, CANDIDATES)
        elif newcomers:
            self._rank(np.array([*self._ranking, *newcomers]), soon, CANDIDATES)

    def _learn(self) -> None:
        for ticket, tokens, prompt, seconds in self._ended:
            self.service.observe(seconds, 1.0, prompt, tokens)
            self.lengths.learn(ticket, tokens)
        self._ended.clear()

    def _foretell_again(self, now: float) -> None:
        """Foretell those that live once more, when something was learned since."""
        if now - self._foretold_at >= FORETOLD_SECONDS and self.lengths.observed != self._foretold_from:
            self._foretold_at, self._foretold_from = now, self.lengths.observed
            self.lengths.refresh(np.fromiter(self._live, np.intp, len(self._live)))
            self._expect(self._line.indices)

    def _expect(self, waiting: Indices) -> None:
        """Note down what those that wait are expected to say, and what their bins cost.

        Alike in prompt and answer is alike in cost, and then whoever came first goes first.
        """
        ledger = self._ledger
        ledger.tokens[waiting] = self._expected_tokens(waiting, np.zeros(len(waiting)))
        octave = BINS_PER_OCTAVE
        prompt, tokens = (
            np.exp2(np.round(np.log2(np.maximum(counts[waiting], 1.0)) * octave) / octave)
            for counts in (ledger.prompt, ledger.tokens)
        )
        ledger.cost[waiting] = self._stay(prompt, tokens)

    def _work_out_patience(self, moment: SchedulerSnapshot) -> None:
        """By when each of those that wait shall have started."""
        self._patience_at = moment.now
        ledger = self._ledger
        waiting, running = self._written_down(), _indices(moment.running)
        stay = np.zeros(len(ledger))
        """Seconds from start to end that are expected of each."""
        stay[waiting] = self._stay(ledger.prompt[waiting], ledger.tokens[waiting])
        if len(running):
            done = np.fromiter((state.num_output_tokens for state in moment.running), float, len(running))
            spent = np.nan_to_num(moment.now - ledger.started[running])
            stay[running] = spent + self._stay(np.zeros(len(running)), self._expected_tokens(running, done))
        indices, starts = self._as_they_came.starts(stay)
        arrival = ledger.arrival[indices]
        would_wait = np.maximum(starts - arrival, 0.0)
        patience = MARGIN * (self._ratio * would_wait + self._seconds)
        latency = np.concatenate([self._as_they_came.latencies, would_wait + stay[indices]])
        if len(latency) >= ENOUGH_FOR_A_TAIL:
            # Nor shall the slowest become slower: what is left of a latency that few exceed anyway, after the stay.
            few = len(latency) - 1 - int((1 - TAIL_QUANTILE) * len(latency))
            crowd = min(1.0, float(would_wait.mean()) / max(float(stay[indices].mean()), 1e-6))
            tail = np.partition(latency, few)[few] * (1 + TAIL_GIVES * crowd**2)
            patience = np.minimum(patience, np.maximum(would_wait, tail - stay[indices]))
        ledger.due[indices] = arrival + np.maximum(patience, MIN_PATIENCE)

    def _expected_tokens(self, indices: Indices, done: Array) -> Array:
        told = self._ledger.told[indices]
        return np.asarray(np.where(np.isnan(told), self.lengths.remaining(indices, done), np.maximum(told - done, 1.0)))

    def _stay(self, prompt: Array, tokens: Array) -> Array:
        seconds: Array = self.service.prices[1] * prompt + self.service.prices[2] * tokens
        return np.maximum(seconds, 1e-4)

    def _acts_on(self, index: int) -> bool:
        """Whether anything is believed of the request's length."""
        return self.lengths.useful or not np.isnan(self._ledger.told[index])

    # ---------------------------------------------------------------------------------------------- the queue

    def admit(self, moment: SchedulerSnapshot) -> Admission:
        """The order by cost and patience; as they came while too little is known."""
        most, line = self._guard(moment), self._line.indices
        if not self.lengths.useful and not self._somebody_told():
            return Admission(max_num_admitted=most)
        places = max(0, moment.max_num_running - len(moment.running))
        # Some of the line may be held back by the engine; those in front of it shall not be all that are named.
        needed = places + MORE_THAN_PLACES + max(0, len(line) - len(moment.waiting))
        if len(self._ranking) < min(needed, len(line)) or moment.now - self._ranked_at > STALE_SECONDS:
            # The newest are at the end; where others can take all places they are foretold when there is time for it.
            if self._just_started or len(self._written_down()) < needed:
                self._catch_up()
            if moment.now - self._patience_at > STALE_SECONDS:
                self._work_out_patience(moment)
            self._rank(self._written_down(), moment.now, max(needed, CANDIDATES))
        return Admission(
            max_num_admitted=most, by_id=[self._live[index].request_id for index in islice(self._ranking, needed)]
        )

    def _somebody_told(self) -> bool:
        """Whether any of those that wait told how long its answer will be."""
        if not np.isnan(self._ledger.told[self._written_down()]).all():
            return True
        return any(not np.isnan(told_tokens(request)) for request in self._new.values())

    def _written_down(self) -> Indices:
        """Those in line of whom something is known, in the order of arrival."""
        return self._line.indices[: len(self._line) - sum(index in self._line for index in self._new)]

    def _rank(self, indices: Indices, now: float, most: int) -> None:
        self._ranked_at = now
        self._ranking = dict.fromkeys(ranked(self._ledger, indices, now, most))

    def _guard(self, moment: SchedulerSnapshot) -> int | None:
        """After a preemption nobody starts until those that run have room to go on."""
        if moment.now - self._preempted_at > GUARD_SECONDS or not moment.running:
            return None
        return 0 if moment.free_kv_tokens < GUARD_TOKENS * len(moment.running) else 1

    def preemption_order(self, running: Sequence[RequestState]) -> Sequence[int] | None:
        """Those first whose blocks are dear to make again for what they still hold them.

        A victim's work (its whole context) is done twice; what is gained is its blocks, for as long as it would have
        kept them. Who was preempted before is spared the more.
        """
        self._catch_up()
        indices = _indices(running)
        done = np.array([state.num_output_tokens for state in running], float)
        remaining = self._expected_tokens(indices, done)
        work = (self._ledger.prompt[indices] + done) * 4.0 ** np.array([state.num_preemptions for state in running])
        return [int(place) for place in np.argsort(-work / remaining, kind="stable")]

    # --------------------------------------------------------------------------------------- reporting, keeping

    def metrics(self) -> Mapping[str, float]:
        """For ``/metrics``."""
        return {
            "finished_requests_learned": float(self.lengths.observed),
            "output_length_calibration_error": self.lengths.calibration_error,
            "seconds_per_output_token": float(self.service.prices[2]),
        }

    def decisions(self, last: int, request_id: str | None = None) -> Sequence[Mapping[str, Any]]:
        """The newest starts, the oldest first."""
        self._catch_up()
        found = [s for s in self._starts if request_id is None or s["request_id"].startswith(request_id)]
        return found[-last:]

    def close(self) -> None:
        """Keep what was learned."""
        self._catch_up()
        self._learn()
        if self._store is not None and self.lengths.observed != self._saved:
            self._store.save(self._kept())

    def _kept(self) -> dict[str, object]:
        return {"lengths": self.lengths.kept(), "service": self.service.prices.tolist()}

    def _restore(self, store: PersistentState, slots: int) -> None:
        kept = store.load()
        if kept is None:
            return
        try:
            self.lengths.restore(kept["lengths"])
            self.service.prices[:] = kept["service"]
        except (KeyError, TypeError, ValueError) as error:
            logger.warning("What was kept about output lengths does not fit this release: %s", error)
            self.lengths = LengthPredictor(slots)
        self._saved = self.lengths.observed
