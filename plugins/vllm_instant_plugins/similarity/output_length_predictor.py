"""How long answers will be: a distribution for each request, learned online from those that finished.

Lengths fall into bins that grow geometrically. Each context (``features.contexts``) counts, bin by bin, how many
answers got that far and how many ended there: the hazard, from which an answer that was cut off by its limit is as
good a witness as one that ended by itself (Kaplan and Meier 1958). A context that has seen little leans on the counts
of all. The kinds of contexts are mixed by how well each foretold the latest answers (Bayesian averaging with
forgetting), so that a useless one costs nothing and none has to be chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant import RequestState
from vllm_instant_plugins.jit import compiled
from vllm_instant_plugins.similarity.features import KINDS, Contexts, Scorer, contexts

Array = npt.NDArray[np.float64]

STEPS_PER_OCTAVE = 3
EDGES: Array = np.unique(np.round(2.0 ** (np.arange(0, 20 * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE)))
"""Bin ``b`` holds lengths from ``EDGES[b]`` to below ``EDGES[b + 1]``, in tokens; the last one all that are longer."""
BINS = len(EDGES)
USEFUL = 50
"""From so many finished requests on, what is learned may be acted on."""
PRIOR_TOKENS = 256.0
"""Before anything is known, an answer goes on for so long on average."""
LEANING = 0.5
"""A context weighs its own counts against so many imagined requests like all others."""
MEMORY = 0.97
"""What a context keeps of its counts when it learns again."""
FORGETTING = 0.98
MAX_CONTEXTS = 4096
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Quantiles whose truth is checked."""


@compiled
def _survival(events: Array, risk: Array, rows: npt.NDArray[np.intp], weights: Array, prior: Array, out: Array) -> None:
    """Mix what the contexts say into ``out[n, bins + 1]``: the chance that a request gets as far as each edge."""
    count, kinds = rows.shape
    bins = events.shape[1]
    for n in range(count):
        for b in range(bins + 1):
            out[n, b] = 0.0
        for kind in range(kinds):
            row = rows[n, kind]
            alive = 1.0
            for b in range(bins):
                out[n, b] += weights[kind] * alive
                general = (events[0, b] + LEANING * prior[b]) / (risk[0, b] + LEANING)
                hazard = (events[row, b] + LEANING * general) / (risk[row, b] + LEANING)
                alive *= 1.0 - min(hazard, 1.0)
            out[n, bins] += weights[kind] * alive


@compiled
def _remaining(
    curves: Array, indices: npt.NDArray[np.intp], done: Array, limits: Array, edges: Array, out: Array
) -> None:
    """Expected tokens after ``done``, never beyond ``limit``: the integral of the chance to be still running."""
    for n in range(len(done)):
        # What goes on says at least one more; a sum over whole tokens is an integral between their middles.
        survival = curves[indices[n]]
        start, stop = done[n] + 1.0, limits[indices[n]] + 1.0
        now, total = -1.0, 0.0
        for b in range(len(edges)):
            left = edges[b]
            right = edges[b + 1] if b + 1 < len(edges) else max(2.0 * left, stop)
            at, to = survival[b], survival[b + 1]
            low, high = max(left, start), min(right, stop)
            if high <= low:
                continue
            slope = (to - at) / (right - left)
            first, last = at + slope * (low - left), at + slope * (high - left)
            if now < 0.0:
                now = max(first, 1e-9)
            total += 0.5 * (first + last) * (high - low)
        out[n] = min(max(total / now, 1.0), max(stop - start, 1.0)) if now > 0.0 else 1.0


_POINTS: Array = np.append(EDGES, 2 * EDGES[-1])


@dataclass(frozen=True)
class PendingObservation:
    """What is still to be known of a request that is gone, until it was learned from."""

    contexts: Contexts
    features: Any
    first_guess: Array
    limit: float


class LengthPredictor:
    """Distributions of output lengths.

    Args:
        max_requests: a first size; it grows.

    """

    def __init__(self, max_requests: int = 64) -> None:
        self.observed = 0
        """Finished requests that were learned from."""
        self.scorer = Scorer()
        self._rows: dict[tuple[int, tuple[int, ...]], int] = {(0, ()): 0}
        self._events: Array = np.zeros((64, BINS))
        self._risk: Array = np.zeros((64, BINS))
        self._log_weights: Array = np.zeros(len(KINDS))
        widths = np.diff(np.append(EDGES, 2 * EDGES[-1]))
        self._prior: Array = 1 - np.exp(-widths / PRIOR_TOKENS)
        self._below: Array = np.array(LEVELS)
        """Share of the outcomes that were below each of ``LEVELS``, recently."""
        self._contexts: dict[int, Contexts] = {}
        self._features: dict[int, Any] = {}
        self._row: npt.NDArray[np.intp] = np.zeros((max_requests, len(KINDS)), np.intp)
        self._limit: Array = np.ones(max_requests)
        self._first_guess: Array = np.ones((max_requests, BINS + 1))
        self._curve: Array = np.ones((max_requests, BINS + 1))
        self._random = np.random.default_rng(0)

    @property
    def useful(self) -> bool:
        """Whether enough was seen to act on it."""
        return self.observed >= USEFUL

    @property
    def weights(self) -> Array:
        """How much each of ``KINDS`` is believed; sums to 1."""
        powers = np.exp(self._log_weights - self._log_weights.max())
        return np.asarray(powers / powers.sum())

    def enter(self, request: RequestState) -> None:
        """Put a new request into its contexts."""
        index = request.index
        if index >= len(self._limit):
            more = max(index + 1, 2 * len(self._limit)) - len(self._limit)
            self._row = np.pad(self._row, ((0, more), (0, 0)))
            self._limit = np.pad(self._limit, (0, more), constant_values=1.0)
            self._first_guess, self._curve = (
                np.pad(curves, ((0, more), (0, 0)), constant_values=1.0) for curves in (self._first_guess, self._curve)
            )
        features = self.scorer.features(request)
        described = contexts(request, self.scorer.score(features))
        self._features[index], self._contexts[index] = features, described
        self._row[index] = [self._row_of(kind, context) for kind, context in enumerate(described)]
        self._limit[index] = max(1, request.max_tokens)
        self._first_guess[index] = self._curve[index] = self.survival(np.array([index]))[0]

    def survival(self, indices: npt.NDArray[np.intp]) -> Array:
        """``[requests, bins + 1]``: the chance to get as far as each of ``EDGES``, as it is believed now."""
        out: Array = np.empty((len(indices), BINS + 1))
        _survival(self._events, self._risk, self._row[indices], self.weights, self._prior, out)
        return out

    def refresh(self, indices: npt.NDArray[np.intp]) -> None:
        """Foretell again, from what is known now; ``remaining`` goes by what was foretold last."""
        self._curve[indices] = self.survival(indices)

    def remaining(self, indices: npt.NDArray[np.intp], done: Array) -> Array:
        """Expected further tokens of requests that have said ``done`` and go on."""
        out: Array = np.empty(len(indices))
        done = np.ascontiguousarray(done, np.float64)
        _remaining(self._curve, np.ascontiguousarray(indices), done, self._limit, EDGES, out)
        return out

    def quantile(self, index: int, level: float, done: float = 0.0) -> float:
        """So many tokens in all that a request stays below them with the chance ``level``, if it says over ``done``."""
        survival = self._curve[index]
        alive = np.interp(done + 1, _POINTS, survival)
        reached = np.interp(alive * (1 - level), survival[::-1], _POINTS[::-1])
        return float(min(max(reached, done), self._limit[index]))

    def release(self, index: int) -> PendingObservation | None:
        """The request is gone, and its index with it; what ``learn`` needs to know of it."""
        described, features = self._contexts.pop(index, None), self._features.pop(index, None)
        if described is None or features is None:
            return None
        return PendingObservation(described, features, self._first_guess[index].copy(), float(self._limit[index]))

    def learn(self, ticket: PendingObservation, tokens: int) -> None:
        """A request has said ``tokens`` and ended by itself, or at its limit."""
        tokens = max(1, tokens)
        cut_off = tokens >= ticket.limit
        last = int(np.searchsorted(EDGES, tokens, side="right")) - 1
        self._check(ticket.first_guess, tokens, cut_off)
        rows = np.array([self._row_of(kind, context) for kind, context in enumerate(ticket.contexts)], np.intp)
        self._compare(rows, last, cut_off)
        for row in rows:
            self._events[row] *= MEMORY
            self._risk[row] *= MEMORY
            if cut_off:
                self._risk[row, :last] += 1
            else:
                self._risk[row, : last + 1] += 1
                self._events[row, last] += 1
        self.scorer.learn(ticket.features, tokens, cut_off)
        self.observed += 1

    @property
    def calibration_error(self) -> float:
        """Mean distance between ``LEVELS`` and the shares of recent outcomes below those quantiles; 0 is perfect."""
        return float(np.abs(self._below - LEVELS).mean())

    # ------------------------------------------------------------------------------------------------ learning

    def _check(self, survival: Array, tokens: int, cut_off: bool) -> None:
        """Where the outcome fell in what was foretold when the request came."""
        # Lengths are whole numbers: anywhere within the token's own share.
        before, after = 1 - np.interp([tokens, tokens + 1], _POINTS, survival)
        if cut_off:
            before, after = before, 1.0
        place = self._random.uniform(before, max(before, after))
        pace = max(0.02, 1 / (self.observed + 1))
        self._below += pace * ((place <= np.array(LEVELS)) - self._below)

    def _compare(self, rows: npt.NDArray[np.intp], last: int, cut_off: bool) -> None:
        """Believe the kinds of contexts by the chance that each gave to what happened."""
        chances = np.empty(len(rows))
        one = np.empty((1, BINS + 1))
        for kind in range(len(rows)):
            alone = np.zeros(len(rows))
            alone[kind] = 1.0
            _survival(self._events, self._risk, rows[None, :], alone, self._prior, one)
            chances[kind] = one[0, last] if cut_off else one[0, last] - one[0, last + 1]
        self._log_weights = FORGETTING * self._log_weights + np.log(np.maximum(chances, 1e-6))
        self._log_weights -= self._log_weights.max()

    def _row_of(self, kind: int, context: tuple[int, ...]) -> int:
        row = self._rows.get((kind, context))
        if row is None:
            if len(self._rows) >= MAX_CONTEXTS:
                self._drop_thin_contexts()
            row = self._rows[(kind, context)] = len(self._rows)
            if row >= len(self._events):
                self._events = np.pad(self._events, ((0, len(self._events)), (0, 0)))
                self._risk = np.pad(self._risk, ((0, len(self._risk)), (0, 0)))
        return row

    def _drop_thin_contexts(self) -> None:
        """Keep the half of the contexts that was seen most."""
        seen = self._risk[: len(self._rows), 0]
        keep = set(np.argsort(-seen, kind="stable")[: MAX_CONTEXTS // 2].tolist()) | {0}
        kept = [(key, row) for key, row in self._rows.items() if row in keep]
        rows = [row for _, row in kept]
        events, risk = self._events[rows], self._risk[rows]
        self._events[:], self._risk[:] = 0.0, 0.0
        self._events[: len(rows)], self._risk[: len(rows)] = events, risk
        self._rows = {key: number for number, (key, _) in enumerate(kept)}
        for index, described in self._contexts.items():
            self._row[index] = [self._rows.get((kind, context), 0) for kind, context in enumerate(described)]

    # ----------------------------------------------------------------------------------------------- keeping

    def kept(self) -> dict[str, Any]:
        """What the next start should know, as plain data; only what was seen more than a little."""
        known = [(key, row) for key, row in self._rows.items() if self._risk[row, 0] >= 0.5]
        return {
            "edges": EDGES.tolist(),
            "observed": self.observed,
            "log_weights": self._log_weights.tolist(),
            "below": self._below.tolist(),
            "scores": self.scorer.weights.astype(np.float32).tolist(),
            "contexts": [[kind, list(context)] for (kind, context), _ in known],
            "events": [np.round(self._events[row], 3).tolist() for _, row in known],
            "risk": [np.round(self._risk[row], 3).tolist() for _, row in known],
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from what was kept; raises KeyError, TypeError or ValueError when it is of another shape."""
        if kept["edges"] != EDGES.tolist() or len(kept["scores"]) != len(self.scorer.weights):
            raise ValueError("kept by another release")
        events, risk = np.array(kept["events"], float), np.array(kept["risk"], float)
        if len(kept["contexts"]) != len(events) or (len(events) and events.shape[1:] != (BINS,)):
            raise ValueError("contexts and counts do not agree")
        log_weights, below = np.array(kept["log_weights"], float), np.array(kept["below"], float)
        if log_weights.shape != (len(KINDS),) or below.shape != (len(LEVELS),) or events.shape != risk.shape:
            raise ValueError("kept by another release")
        self._log_weights, self._below = log_weights, below
        self.scorer.weights[:] = kept["scores"]
        for (kind, context), event, at_risk in zip(kept["contexts"], events, risk, strict=True):
            row = self._row_of(int(kind), tuple(int(part) for part in context))
            self._events[row], self._risk[row] = event, at_risk
        self.observed = int(kept["observed"])
