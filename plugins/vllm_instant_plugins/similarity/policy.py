"""The ``similarity`` policy: short and alike first, nobody much later than as they came.

Waiting requests are sorted into bins by what they will cost: their prompt and the answer that is expected
(``lengths``). Cheap bins go first, which is what lowers the mean wait most (Smith 1956); what a bin costs is worth less
the more of its patience a request has used up, and its patience is what it would have waited had everybody been served
as they came (``first_come``), times ``wait_ratio``, plus ``wait_seconds``. So a long request is passed by the short
ones for a while, and not for ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vllm_instant import Admission, BatchingPolicy, QueueMoment, RequestState, StepOutcome
from vllm_instant_plugins.keeping import KeptFile
from vllm_instant_plugins.similarity.features import prefix_group
from vllm_instant_plugins.similarity.first_come import FirstComeFirstServed
from vllm_instant_plugins.similarity.lengths import LengthPredictor
from vllm_instant_plugins.similarity.times import LinearTime

logger = logging.getLogger("vllm.instant")

Array = npt.NDArray[np.float64]

BINS_PER_OCTAVE = 2
IMPATIENCE = 2.0
"""What a request costs counts less with this power of the share of its patience that is left: with 1 the bound is
overstepped by some, with more the short ones lose what they gained (simulated: ``tests/plugins/similarity``)."""
SECONDS_PER_TOKEN = 0.03
SECONDS_PER_PROMPT_TOKEN = 0.001
STALE_SECONDS = 0.05
"""The order is worked out again after so long, or when somebody came or left."""
GROUPED = 64
"""So many of the first are put beside those that share their prefix."""
GUARD_SECONDS = 5.0
GUARD_TOKENS = 64.0
"""For so long after somebody lost KV blocks, nobody starts unless all that run can say so many tokens more."""
LEAST_PROMPT_TOKENS = 16
SAVE_SECONDS = 60.0

TAIL_QUANTILE = 0.97
"""Latencies beyond this quantile of first come, first served are the tail, which shall not become longer."""
TAIL_GIVES = 0.3
"""In a crowd it may, by up to this share: without, nothing could be moved there (simulated, as above)."""
ENOUGH_FOR_A_TAIL = 100
LEAST_PATIENCE = 1e-3

CLIENT_KEY = "instant_output_tokens"
"""What a client that knows how long its answer will be writes into ``vllm_xargs``: a number of tokens."""


class SimilarityPolicy(BatchingPolicy):
    """Orders the queue by expected cost with bounded patience.

    Args:
        slots: most requests that run together.
        wait_ratio: a request waits at most so many times what it would have waited as they came,
        wait_seconds: and so many seconds more.
        itl_seconds: goal for the time between tokens of running requests; prompts are read in pieces that keep it.
        store: keeps what was learned about lengths, if anything shall.
        clock: seconds, monotonic.

    """

    def __init__(
        self,
        slots: int,
        wait_ratio: float = 2.0,
        wait_seconds: float = 1.0,
        itl_seconds: float | None = None,
        store: KeptFile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lengths = LengthPredictor(slots)
        self.service = LinearTime([0.0, SECONDS_PER_PROMPT_TOKEN, SECONDS_PER_TOKEN])
        self.step_time = LinearTime([SECONDS_PER_TOKEN / 2, SECONDS_PER_TOKEN / 8, SECONDS_PER_PROMPT_TOKEN])
        self._slots = slots
        self._ratio, self._seconds = wait_ratio, wait_seconds
        self._itl_seconds = itl_seconds
        self._store = store
        self._clock = clock
        self._saved_at, self._saved = clock(), 0
        self._as_they_came = FirstComeFirstServed(slots)
        size = max(64, 2 * slots)
        self._arrival: Array = np.zeros(size)
        self._started: Array = np.full(size, np.nan)
        self._prompt: Array = np.zeros(size)
        self._told: Array = np.full(size, np.nan)
        """Output lengths that clients told."""
        self._prefix: npt.NDArray[np.int64] = np.zeros(size, np.int64)
        self._worst: Array = np.zeros(size)
        self._live: dict[int, RequestState] = {}
        self._admission: tuple[float, int, Admission] | None = None
        self._changes = 0
        self._preempted_at = -np.inf
        if store is not None:
            kept = store.load()
            if kept is not None:
                try:
                    self.lengths.restore(kept["lengths"])
                    self.service.prices[:] = kept["service"]
                except (KeyError, TypeError, ValueError) as error:
                    logger.warning("What was kept about output lengths does not fit this release: %s", error)
                    self.lengths = LengthPredictor(slots)

    # ---------------------------------------------------------------------------------------------- requests

    def enter(self, request: RequestState) -> None:
        """Foretell it, and give it its place in the queue as it would have been."""
        index = request.index
        if index >= len(self._arrival):
            more = max(index + 1, 2 * len(self._arrival)) - len(self._arrival)
            self._arrival, self._prompt, self._worst = (
                np.pad(a, (0, more)) for a in (self._arrival, self._prompt, self._worst)
            )
            self._started, self._told = (
                np.pad(a, (0, more), constant_values=np.nan) for a in (self._started, self._told)
            )
            self._prefix = np.pad(self._prefix, (0, more))
        self._live[index] = request
        self._arrival[index] = request.arrival
        self._started[index] = np.nan
        self._prompt[index] = request.num_prompt_tokens
        told = request.extra_args.get(CLIENT_KEY)
        known = isinstance(told, int | float) and not isinstance(told, bool) and told > 0
        self._told[index] = min(float(told), request.max_tokens) if known and told is not None else np.nan
        self._prefix[index] = prefix_group(request)
        self.lengths.enter(request)
        self._as_they_came.enter(index, request.arrival)
        self._changes += 1

    def started(self, request: RequestState, now: float) -> None:
        """It waited so long; the first start counts."""
        index = request.index
        self._changes += 1
        if index in self._live and np.isnan(self._started[index]):
            self._started[index] = now

    def preempted(self, request: RequestState, now: float) -> None:
        """KV blocks ran out: for a while nobody starts who would make them run out again."""
        self._preempted_at = now
        self._changes += 1

    def finished(self, request: RequestState, now: float, complete: bool) -> None:
        """Learn how long it was and what it took."""
        index = request.index
        if self._live.pop(index, None) is None:
            return
        self._changes += 1
        started = self._started[index]
        seconds = 0.0 if np.isnan(started) else now - started
        self._as_they_came.served(index, seconds)
        if complete and seconds > 0:
            self.service.observe(seconds, 1.0, request.num_prompt_tokens, request.num_output_tokens)
            self.lengths.learn(request)
            self._save_sometimes(now)
        self.lengths.forget(index)

    # ---------------------------------------------------------------------------------------------- the queue

    def admit(self, moment: QueueMoment) -> Admission:
        """The order by cost and patience; as they came while too little is known."""
        most = self._guard(moment)
        if not self.lengths.useful and np.isnan(self._told[[state.index for state in moment.waiting]]).all():
            return Admission((), most)
        known = self._admission
        if known is not None and known[1] == self._changes and moment.now - known[0] < STALE_SECONDS:
            return Admission(known[2].order, most)
        indices = np.fromiter((state.index for state in moment.waiting), np.intp, len(moment.waiting))
        tokens = self._remaining_tokens(moment, indices)
        cost = self._cost_of_bins(self._prompt[indices], tokens)
        left = self._patience_left(moment.now, indices)
        order = np.argsort(cost * np.maximum(left, 0.0) ** IMPATIENCE, kind="stable")
        late = left[order] <= 0
        if late.any():
            # Whose patience is at its end go in the order in which it ended.
            order[late] = order[late][np.argsort(left[order[late]], kind="stable")]
        order = self._beside_their_prefix(order, indices, cost, left)
        admission = Admission(order.tolist(), most)
        self._admission = (moment.now, self._changes, admission)
        return admission

    def _remaining_tokens(self, moment: QueueMoment, waiting: npt.NDArray[np.intp]) -> Array:
        """Expected output of those that wait; and refresh the expected service of all for ``first_come``."""
        expected = np.zeros(len(self._arrival))
        tokens = self._expected_tokens(waiting, np.zeros(len(waiting)))
        expected[waiting] = self._service_seconds(self._prompt[waiting], tokens)
        if moment.running:
            running = np.fromiter((state.index for state in moment.running), np.intp, len(moment.running))
            done = np.fromiter((state.num_output_tokens for state in moment.running), float, len(running))
            more = self._expected_tokens(running, done)
            spent = np.nan_to_num(moment.now - self._started[running])
            expected[running] = spent + self._service_seconds(np.zeros(len(running)), more)
        indices, starts = self._as_they_came.starts(expected)
        arrival = self._arrival[indices]
        would_wait = np.maximum(starts - arrival, 0.0)
        patience = self._ratio * would_wait + self._seconds
        latency = np.concatenate([self._as_they_came.latencies, would_wait + expected[indices]])
        if len(latency) >= ENOUGH_FOR_A_TAIL:
            # Nor shall the slowest become slower: what is left of a latency that few exceed anyway, after the service.
            few = len(latency) - 1 - int((1 - TAIL_QUANTILE) * len(latency))
            crowd = min(1.0, float(would_wait.mean()) / max(float(expected[indices].mean()), 1e-6))
            tail = np.partition(latency, few)[few] * (1 + TAIL_GIVES * crowd**2)
            patience = np.minimum(patience, np.maximum(would_wait, tail - expected[indices]))
        self._worst[indices] = arrival + np.maximum(patience, LEAST_PATIENCE)
        return tokens

    def _expected_tokens(self, indices: npt.NDArray[np.intp], done: Array) -> Array:
        told = self._told[indices]
        return np.asarray(np.where(np.isnan(told), self.lengths.remaining(indices, done), np.maximum(told - done, 1.0)))

    def _service_seconds(self, prompt: Array, tokens: Array) -> Array:
        return np.maximum(np.asarray(self.service.prices[1] * prompt + self.service.prices[2] * tokens), 1e-4)

    def _cost_of_bins(self, prompt: Array, tokens: Array) -> Array:
        """What the bins cost: alike in prompt and answer is alike in cost, and then whoever came first goes first."""
        octave = BINS_PER_OCTAVE

        def rounded(count: Array) -> Array:
            return np.asarray(2.0 ** (np.round(np.log2(np.maximum(count, 1.0)) * octave) / octave))

        return self._service_seconds(rounded(prompt), rounded(tokens))

    def _patience_left(self, now: float, indices: npt.NDArray[np.intp]) -> Array:
        """Share of each request's patience that is left; 0 or less when it should have started."""
        worst, arrival = self._worst[indices], self._arrival[indices]
        left: Array = (worst - now) / (worst - arrival)
        return left

    def _beside_their_prefix(
        self, order: npt.NDArray[np.intp], indices: npt.NDArray[np.intp], cost: Array, left: Array
    ) -> npt.NDArray[np.intp]:
        """Put those of the same bin that share a long prefix with one of the first right behind it.

        They read it from the cache then, before it is evicted. Nobody passes one whose patience is at its end.
        """
        prefix = self._prefix[indices[order]]
        if not prefix[:GROUPED].any():
            return order
        cost, left = cost[order], left[order]
        taken = np.zeros(len(order), bool)
        placed: list[int] = []
        for place in range(min(GROUPED, len(order))):
            if taken[place]:
                continue
            taken[place] = True
            placed.append(place)
            if prefix[place] and not (left[place:] <= 0).any():
                others = np.flatnonzero(~taken & (prefix == prefix[place]) & (cost == cost[place]))
                taken[others] = True
                placed.extend(others.tolist())
        return np.asarray(np.concatenate([order[placed], order[~taken]]))

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
        indices = np.array([state.index for state in running], np.intp)
        done = np.array([state.num_output_tokens for state in running], float)
        remaining = self._expected_tokens(indices, done)
        work = (self._prompt[indices] + done) * 4.0 ** np.array([state.num_preemptions for state in running])
        return [int(place) for place in np.argsort(-work / remaining, kind="stable")]

    def most_prompt_tokens(self, moment: QueueMoment) -> int | None:
        """What fits into a step beside those that run, by the goal for the time between their tokens."""
        if self._itl_seconds is None or not moment.running or self.step_time.measured < 10:
            return None
        fixed, decode, prompt = self.step_time.prices
        decoding = sum(state.num_output_tokens > 0 for state in moment.running)
        if not decoding:
            return None
        room = self._itl_seconds - fixed - decode * decoding
        return max(LEAST_PROMPT_TOKENS, int(room / max(prompt, 1e-7)))

    # ------------------------------------------------------------------------------------------------ learning

    def observe(self, outcome: StepOutcome) -> None:
        """Learn what a step takes."""
        decoded = len(outcome.requests) + sum(outcome.drafted)
        if outcome.seconds > 0 and outcome.num_scheduled_tokens:
            prompt = max(0, outcome.num_scheduled_tokens - decoded)
            self.step_time.observe(outcome.seconds, 1.0, min(decoded, outcome.num_scheduled_tokens), prompt)

    def measures(self) -> Mapping[str, float]:
        """For ``/metrics``."""
        return {
            "finished_requests_learned": float(self.lengths.observed),
            "output_length_calibration_error": self.lengths.calibration_error,
            "seconds_per_output_token": float(self.service.prices[2]),
        }

    def close(self) -> None:
        """Keep what was learned."""
        if self._store is not None and self.lengths.observed != self._saved:
            self._store.save(self._kept())

    def _save_sometimes(self, now: float) -> None:
        if self._store is not None and now - self._saved_at > SAVE_SECONDS:
            self._saved_at, self._saved = now, self.lengths.observed
            self._store.save_aside(self._kept())

    def _kept(self) -> dict[str, object]:
        return {"lengths": self.lengths.kept(), "service": self.service.prices.tolist()}
