"""The ``similarity`` policy: short and alike first, nobody much later than as they came.

Waiting requests are sorted into bins by what they will cost: their prompt and the answer that is expected
(``lengths``). Cheap bins go first, which is what lowers the mean wait most (Smith 1956); what a bin costs is worth less
the more of its patience a request has used up, and its patience is what it would have waited had everybody been served
as they came (``first_come``), times ``wait_ratio``, plus ``wait_seconds``. So a long request is passed by the short
ones for a while, and not for ever.

Whatever takes long (foretelling, learning, the other queue) is done in ``think``, while the model runs.
"""

from __future__ import annotations

import logging
import operator
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant import Admission, BatchingPolicy, QueueMoment, RequestState
from vllm_instant_plugins.keeping import KeptFile
from vllm_instant_plugins.similarity.first_come import FirstComeFirstServed
from vllm_instant_plugins.similarity.ledger import Ledger
from vllm_instant_plugins.similarity.lengths import LengthPredictor, Ticket
from vllm_instant_plugins.similarity.times import LinearTime

logger = logging.getLogger("vllm.instant")

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

BINS_PER_OCTAVE = 2
IMPATIENCE = 1.5
"""What a request costs counts less with this power of the share of its patience that is left: with less the bound is
overstepped by some, with more the short ones lose what they gained (simulated: ``tests/plugins/similarity``)."""
SECONDS_PER_TOKEN = 0.03
SECONDS_PER_PROMPT_TOKEN = 0.001
STALE_SECONDS = 0.1
"""Patience is worked out again after so long at the latest, when the model leaves time sooner."""
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
LEAST_PATIENCE = 1e-3

_index_of = operator.attrgetter("index")


def _indices(states: Sequence[RequestState]) -> Indices:
    return np.fromiter(map(_index_of, states), np.intp, len(states))


class SimilarityPolicy(BatchingPolicy):
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
        store: KeptFile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lengths = LengthPredictor(slots)
        self.service = LinearTime([0.0, SECONDS_PER_PROMPT_TOKEN, SECONDS_PER_TOKEN])
        """Seconds of a request's stay: constant, for each prompt token, for each output token."""
        self._ledger = Ledger(max(64, 2 * slots))
        self._as_they_came = FirstComeFirstServed(slots)
        self._ratio, self._seconds = wait_ratio, wait_seconds
        self._store = store
        self._saved_at, self._saved = clock(), 0
        self._live: dict[int, RequestState] = {}
        self._waiting: dict[int, None] = {}
        """Indices of those that have not started, in the order of their arrival."""
        self._new: dict[int, RequestState] = {}
        """Came, and nothing was foretold yet."""
        self._ended: list[tuple[Ticket, int, int, float]] = []
        """Ended by themselves, to be learned from: output tokens, prompt tokens, seconds."""
        self._starts: deque[dict[str, Any]] = deque(maxlen=512)
        self._start_of: dict[int, dict[str, Any]] = {}
        self._passes: dict[int, int] = {}
        """How many that came before them those passed that were put in order last."""
        self._patience_at = self._foretold_at = -np.inf
        self._foretold_from = 0
        self._preempted_at = -np.inf
        if store is not None:
            self._restore(store, slots)

    # ---------------------------------------------------------------------------------------------- requests

    def enter(self, request: RequestState) -> None:
        """Note it down, and give it its place in the queue as it would have been."""
        index = request.index
        self._live[index] = self._new[index] = request
        self._waiting[index] = None
        self._ledger.enter(request, self._seconds)
        self._as_they_came.enter(index, request.arrival)

    def started(self, request: RequestState, now: float) -> None:
        """It waited so long; the first start counts."""
        index, ledger = request.index, self._ledger
        if index not in self._waiting:
            return
        del self._waiting[index]
        ledger.started[index] = now
        arrival = ledger.arrival[index]
        start = {
            "request_id": request.request_id,
            "waited_ms": 1e3 * float(now - arrival),
            "bound_ms": 1e3 * float(ledger.due[index] - arrival) / MARGIN if self._acts_on(request) else None,
            "expected_tokens": float(ledger.tokens[index]),
            "tokens": None,
            "older_waiting": self._passes.get(index, 0),
        }
        self._starts.append(start)
        self._start_of[index] = start

    def preempted(self, request: RequestState, now: float) -> None:
        """KV blocks ran out: for a while nobody starts who would make them run out again."""
        self._preempted_at = now

    def finished(self, request: RequestState, now: float, complete: bool) -> None:
        """Keep what there is to learn of it, for when there is time."""
        index = request.index
        if self._live.pop(index, None) is None:
            return
        self._waiting.pop(index, None)
        self._foretell_new(index)
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

    def think(self, moment: QueueMoment) -> None:
        """Learn from those that ended, foretell those that came, and work out everybody's patience."""
        self._learn()
        if self._store is not None and moment.now - self._saved_at > SAVE_SECONDS:
            self._saved_at, self._saved = moment.now, self.lengths.observed
            self._store.save_aside(self._kept())
        if moment.waiting:
            self._foretell(moment)
            self._work_out_patience(moment)

    def _learn(self) -> None:
        for ticket, tokens, prompt, seconds in self._ended:
            self.service.observe(seconds, 1.0, prompt, tokens)
            self.lengths.learn(ticket, tokens)
        self._ended.clear()

    def _foretell_new(self, *only: int) -> None:
        """Foretell what has come since the last time."""
        for index in only or tuple(self._new):
            request = self._new.pop(index, None)
            if request is not None:
                self.lengths.enter(request)
                self._expect(np.array([index]))

    def _foretell(self, moment: QueueMoment) -> None:
        """Foretell those that wait, the newest for the first time, the others when something was learned since."""
        self._foretell_new()
        due = moment.now - self._foretold_at >= FORETOLD_SECONDS and self.lengths.observed != self._foretold_from
        if due:
            self._foretold_at, self._foretold_from = moment.now, self.lengths.observed
            live = np.fromiter(self._live, np.intp, len(self._live))
            self.lengths.refresh(live)
            self._expect(_indices(moment.waiting))

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

    def _work_out_patience(self, moment: QueueMoment) -> None:
        """By when each of those that wait shall have started."""
        self._patience_at = moment.now
        ledger = self._ledger
        waiting, running = _indices(moment.waiting), _indices(moment.running)
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
        ledger.due[indices] = arrival + np.maximum(patience, LEAST_PATIENCE)

    def _expected_tokens(self, indices: Indices, done: Array) -> Array:
        told = self._ledger.told[indices]
        return np.asarray(np.where(np.isnan(told), self.lengths.remaining(indices, done), np.maximum(told - done, 1.0)))

    def _stay(self, prompt: Array, tokens: Array) -> Array:
        seconds: Array = self.service.prices[1] * prompt + self.service.prices[2] * tokens
        return np.maximum(seconds, 1e-4)

    def _acts_on(self, request: RequestState) -> bool:
        """Whether anything is believed of the request's length."""
        return self.lengths.useful or not np.isnan(self._ledger.told[request.index])

    # ---------------------------------------------------------------------------------------------- the queue

    def admit(self, moment: QueueMoment) -> Admission:
        """The order by cost and patience; as they came while too little is known."""
        most = self._guard(moment)
        if not self.lengths.useful and not any(map(self._acts_on, moment.waiting)):
            return Admission((), most)
        places = max(0, moment.most_running - len(moment.running))
        # The newest are at the end; where others can take all places they are foretold when there is time for it.
        foretold = len(moment.waiting) - len(self._new)
        if foretold < places + MORE_THAN_PLACES:
            self._foretell_new()
            foretold = len(moment.waiting)
        if moment.now - self._patience_at > STALE_SECONDS:
            self._work_out_patience(moment)
        ledger, indices = self._ledger, _indices(moment.waiting[:foretold])
        cost, arrival, due = ledger.cost[indices], ledger.arrival[indices], ledger.due[indices]
        left = (due - moment.now) / np.maximum(due - arrival, LEAST_PATIENCE)
        # Whose patience is at its end go before all others, in the order in which it ended.
        weight = np.where(left > 0, cost * np.abs(left) ** IMPATIENCE, left)
        needed = places + MORE_THAN_PLACES
        if needed < len(weight):
            first = np.argpartition(weight, needed)[:needed]
            first.sort()
        else:
            first = np.arange(len(weight))
        order = first[np.argsort(weight[first], kind="stable")]
        chosen = self._beside_their_prefix(order, ledger.prefix[indices], cost, left)
        self._passes = dict(zip(indices[chosen].tolist(), chosen, strict=True))
        return Admission(chosen, most)

    @staticmethod
    def _beside_their_prefix(order: Indices, prefix: npt.NDArray[np.int64], cost: Array, left: Array) -> list[int]:
        """Put those of the same bin that share a long prefix with one of the first right behind it.

        They read it from the cache then, before it is evicted. Nobody passes one whose patience is at its end.
        """
        if not prefix[order].any():
            return [int(place) for place in order]
        placed: dict[int, None] = {}
        for number, place in enumerate(order.tolist()):
            if place in placed:
                continue
            placed[place] = None
            behind = order[number + 1 :]
            if prefix[place] and not (left[behind] <= 0).any():
                alike = behind[(prefix[behind] == prefix[place]) & (cost[behind] == cost[place])]
                placed.update(dict.fromkeys(alike.tolist()))
        return list(placed)

    def _guard(self, moment: QueueMoment) -> int | None:
        """After a preemption nobody starts until those that run have room to go on."""
        if moment.now - self._preempted_at > GUARD_SECONDS or not moment.running:
            return None
        return 0 if moment.free_kv_tokens < GUARD_TOKENS * len(moment.running) else 1

    def spare(self, running: Sequence[RequestState]) -> Sequence[int] | None:
        """Those first whose blocks are dear to make again for what they still hold them.

        A victim's work (its whole context) is done twice; what is gained is its blocks, for as long as it would have
        kept them. Who was preempted before is spared the more.
        """
        self._foretell_new(*(state.index for state in running))
        indices = _indices(running)
        done = np.array([state.num_output_tokens for state in running], float)
        remaining = self._expected_tokens(indices, done)
        work = (self._ledger.prompt[indices] + done) * 4.0 ** np.array([state.num_preemptions for state in running])
        return [int(place) for place in np.argsort(-work / remaining, kind="stable")]

    # --------------------------------------------------------------------------------------- reporting, keeping

    def measures(self) -> Mapping[str, float]:
        """For ``/metrics``."""
        return {
            "finished_requests_learned": float(self.lengths.observed),
            "output_length_calibration_error": self.lengths.calibration_error,
            "seconds_per_output_token": float(self.service.prices[2]),
        }

    def decisions(self, last: int, request_id: str | None = None) -> Sequence[Mapping[str, Any]]:
        """The newest starts, the oldest first."""
        found = [s for s in self._starts if request_id is None or s["request_id"].startswith(request_id)]
        return found[-last:]

    def close(self) -> None:
        """Keep what was learned."""
        self._learn()
        if self._store is not None and self.lengths.observed != self._saved:
            self._store.save(self._kept())

    def _kept(self) -> dict[str, object]:
        return {"lengths": self.lengths.kept(), "service": self.service.prices.tolist()}

    def _restore(self, store: KeptFile, slots: int) -> None:
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
