"""Distributions of output lengths, one per request, learned online from finished requests.

Lengths fall into bins that grow geometrically. Each context (``features.contexts``) counts per bin the answers that
reached it and the answers that ended in it; the ratio is the hazard, which answers truncated by their limit inform as
well as complete ones (Kaplan and Meier 1958). Contexts with few observations shrink towards the counts of all
requests. The kinds of contexts are mixed by their likelihood of recent outcomes (Bayesian model averaging with
forgetting), so that an uninformative kind loses its weight and none has to be configured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant import RequestState
from vllm_instant_plugins.jit import compiled
from vllm_instant_plugins.similarity.features import (
    CONTEXT_KINDS,
    Contexts,
    LengthRegressor,
    SparseFeatures,
    contexts,
)

Array = npt.NDArray[np.float64]

STEPS_PER_OCTAVE = 3
EDGES: Array = np.unique(np.round(2.0 ** (np.arange(0, 20 * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE)))
"""Bin ``b`` holds lengths from ``EDGES[b]`` to below ``EDGES[b + 1]`` tokens; the last bin all longer ones."""
NUM_BINS = len(EDGES)
MIN_OBSERVATIONS = 50
"""Finished requests after which predictions are used."""
PRIOR_MEAN_TOKENS = 256.0
"""Mean output length before any observation."""
PRIOR_WEIGHT = 0.5
"""Weight of the shared counts in a context's hazard, in observations."""
COUNT_MEMORY = 0.97
"""Factor by which a context's counts decay with each of its observations."""
LIKELIHOOD_MEMORY = 0.98
"""Factor by which the log-likelihoods of the kinds of contexts decay with each observation."""
MAX_CONTEXTS = 4096
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Quantile levels at which the calibration is measured."""


@compiled
def _mix_survival(
    events: Array, at_risk: Array, rows: npt.NDArray[np.intp], weights: Array, prior: Array, out: Array
) -> None:
    """Write into ``out[n, bins + 1]`` the probability that request n reaches each edge: the mixture of its contexts."""
    count, kinds = rows.shape
    bins = events.shape[1]
    for n in range(count):
        for b in range(bins + 1):
            out[n, b] = 0.0
        for kind in range(kinds):
            row = rows[n, kind]
            # Kaplan-Meier: S(b + 1) = S(b) * (1 - h(b)) with the hazard h(b) = events(b) / at_risk(b).
            survival = 1.0
            for b in range(bins):
                out[n, b] += weights[kind] * survival
                # Two levels of shrinkage: this context towards row 0 (all requests), row 0 towards the prior.
                shared = (events[0, b] + PRIOR_WEIGHT * prior[b]) / (at_risk[0, b] + PRIOR_WEIGHT)
                hazard = (events[row, b] + PRIOR_WEIGHT * shared) / (at_risk[row, b] + PRIOR_WEIGHT)
                survival *= 1.0 - min(hazard, 1.0)
            out[n, bins] += weights[kind] * survival


@compiled
def _mean_remaining(
    curves: Array, indices: npt.NDArray[np.intp], done: Array, limits: Array, edges: Array, out: Array
) -> None:
    """Write into ``out`` the expected tokens after ``done``, at most up to ``limits``.

    E[T - done | T > done] is the sum of S(t) over t > done, divided by S(done + 1). Within a bin S is linear, so the
    sum is the area of a trapezoid per bin.
    """
    for n in range(len(done)):
        survival = curves[indices[n]]
        # A running request emits at least one more token; the sum over whole tokens t = done + 1 .. limit is taken as
        # the integral from done + 1 to limit + 1.
        start, stop = done[n] + 1.0, limits[indices[n]] + 1.0
        at_start, total = -1.0, 0.0
        for b in range(len(edges)):
            left = edges[b]
            # The last bin is open: it is given twice its lower edge, or the limit if that is greater.
            right = edges[b + 1] if b + 1 < len(edges) else max(2.0 * left, stop)
            low, high = max(left, start), min(right, stop)
            if high <= low:
                continue
            slope = (survival[b + 1] - survival[b]) / (right - left)
            at_low, at_high = survival[b] + slope * (low - left), survival[b] + slope * (high - left)
            if at_start < 0.0:
                at_start = max(at_low, 1e-9)
            total += 0.5 * (at_low + at_high) * (high - low)
        out[n] = min(max(total / at_start, 1.0), max(stop - start, 1.0)) if at_start > 0.0 else 1.0


_POINTS: Array = np.append(EDGES, 2 * EDGES[-1])


@dataclass(frozen=True, slots=True)
class PendingObservation:
    """A finished request that the predictor has not learned from yet."""

    contexts: Contexts
    features: SparseFeatures
    first_survival: Array
    """Survival curve that was predicted when the request entered."""
    limit: float


class OutputLengthPredictor:
    """Predicted output lengths of the live requests, by ``RequestState.index``.

    Args:
        size: initial capacity in requests; it grows as needed.

    """

    def __init__(self, size: int = 64) -> None:
        self.num_observed = 0
        """Finished requests learned from."""
        self.regressor = LengthRegressor()
        self._row_of_context: dict[tuple[int, tuple[int, ...]], int] = {(0, ()): 0}
        self._events: Array = np.zeros((64, NUM_BINS))
        """``[contexts, bins]``: decayed counts of answers that ended in each bin."""
        self._at_risk: Array = np.zeros((64, NUM_BINS))
        """``[contexts, bins]``: decayed counts of answers that reached each bin."""
        self._log_likelihoods: Array = np.zeros(len(CONTEXT_KINDS))
        widths = np.diff(np.append(EDGES, 2 * EDGES[-1]))
        # The hazard of a geometric distribution with the prior's mean.
        self._prior: Array = 1 - np.exp(-widths / PRIOR_MEAN_TOKENS)
        self._coverage: Array = np.array(LEVELS)
        """Fraction of recent outcomes below each of the quantiles ``LEVELS``."""
        self._contexts: dict[int, Contexts] = {}
        self._features: dict[int, SparseFeatures] = {}
        self._context_rows: npt.NDArray[np.intp] = np.zeros((size, len(CONTEXT_KINDS)), np.intp)
        self._limit: Array = np.ones(size)
        self._first_survival: Array = np.ones((size, NUM_BINS + 1))
        self._survival: Array = np.ones((size, NUM_BINS + 1))
        self._random = np.random.default_rng(0)

    @property
    def useful(self) -> bool:
        """Whether enough requests were observed to act on predictions."""
        return self.num_observed >= MIN_OBSERVATIONS

    @property
    def weights(self) -> Array:
        """Posterior weights of ``CONTEXT_KINDS``; they sum to 1."""
        likelihoods = np.exp(self._log_likelihoods - self._log_likelihoods.max())
        return np.asarray(likelihoods / likelihoods.sum())

    def add(self, request: RequestState) -> None:
        """Look up the contexts of a new request and predict it."""
        index = request.index
        if index >= len(self._limit):
            self._grow(index)
        features = self.regressor.features(request)
        found = contexts(request, self.regressor.predict(features))
        self._features[index], self._contexts[index] = features, found
        self._context_rows[index] = [self._row_of(kind, context) for kind, context in enumerate(found)]
        self._limit[index] = max(1, request.max_tokens)
        self._first_survival[index] = self._survival[index] = self.survival(np.array([index]))[0]

    def _grow(self, index: int) -> None:
        more = max(index + 1, 2 * len(self._limit)) - len(self._limit)
        self._context_rows = np.pad(self._context_rows, ((0, more), (0, 0)))
        self._limit = np.pad(self._limit, (0, more), constant_values=1.0)
        self._first_survival, self._survival = (
            np.pad(curves, ((0, more), (0, 0)), constant_values=1.0)
            for curves in (self._first_survival, self._survival)
        )

    def survival(self, indices: npt.NDArray[np.intp]) -> Array:
        """``[requests, bins + 1]``: probability to reach each of ``EDGES``, by the current counts."""
        out: Array = np.empty((len(indices), NUM_BINS + 1))
        _mix_survival(self._events, self._at_risk, self._context_rows[indices], self.weights, self._prior, out)
        return out

    def refresh(self, indices: npt.NDArray[np.intp]) -> None:
        """Predict these requests again from the current counts; until then ``remaining`` uses their last curve."""
        self._survival[indices] = self.survival(indices)

    def remaining(self, indices: npt.NDArray[np.intp], done: Array) -> Array:
        """Expected further tokens of requests that have emitted ``done`` tokens and have not ended."""
        out: Array = np.empty(len(indices))
        done = np.ascontiguousarray(done, np.float64)
        _mean_remaining(self._survival, np.ascontiguousarray(indices), done, self._limit, EDGES, out)
        return out

    def quantile(self, index: int, level: float, done: float = 0.0) -> float:
        """The quantile ``level`` of the request's output length, given that it exceeds ``done``."""
        survival = self._survival[index]
        alive = np.interp(done + 1, _POINTS, survival)
        reached = np.interp(alive * (1 - level), survival[::-1], _POINTS[::-1])
        return float(min(max(reached, done), self._limit[index]))

    def remove(self, index: int) -> PendingObservation | None:
        """Free the index of a request; returns what ``learn`` needs, or None if the request is unknown."""
        found, features = self._contexts.pop(index, None), self._features.pop(index, None)
        if found is None or features is None:
            return None
        return PendingObservation(found, features, self._first_survival[index].copy(), float(self._limit[index]))

    def learn(self, observation: PendingObservation, num_tokens: int) -> None:
        """Learn from a request that emitted ``num_tokens`` and was complete or truncated by its limit."""
        num_tokens = max(1, num_tokens)
        truncated = num_tokens >= observation.limit
        last = int(np.searchsorted(EDGES, num_tokens, side="right")) - 1
        self._update_coverage(observation.first_survival, num_tokens, truncated)
        found = enumerate(observation.contexts)
        rows = np.array([self._row_of(kind, context) for kind, context in found], np.intp)
        self._update_likelihoods(rows, last, truncated)
        for row in rows:
            self._events[row] *= COUNT_MEMORY
            self._at_risk[row] *= COUNT_MEMORY
            if truncated:
                # Censored: it survived all bins before its limit, and nothing is known of the bin of the limit.
                self._at_risk[row, :last] += 1
            else:
                self._at_risk[row, : last + 1] += 1
                self._events[row, last] += 1
        self.regressor.learn(observation.features, num_tokens, truncated)
        self.num_observed += 1

    @property
    def calibration_error(self) -> float:
        """Mean difference between ``LEVELS`` and the fractions of recent outcomes below these quantiles; 0 is best."""
        return float(np.abs(self._coverage - LEVELS).mean())

    # ------------------------------------------------------------------------------------------------ learning

    def _update_coverage(self, survival: Array, num_tokens: int, truncated: bool) -> None:
        """Record below which quantiles of its first prediction the outcome fell."""
        # Randomised probability integral transform: lengths are whole numbers, so the rank is drawn uniformly between
        # F(num_tokens - 1) and F(num_tokens); of a truncated output only the lower end is known.
        before, after = 1 - np.interp([num_tokens, num_tokens + 1], _POINTS, survival)
        if truncated:
            after = 1.0
        rank = self._random.uniform(before, max(before, after))
        rate = max(0.02, 1 / (self.num_observed + 1))
        self._coverage += rate * ((rank <= np.array(LEVELS)) - self._coverage)

    def _update_likelihoods(self, rows: npt.NDArray[np.intp], last: int, truncated: bool) -> None:
        """Add the log-probability that each kind of context alone gave to the outcome."""
        likelihoods = np.empty(len(rows))
        survival = np.empty((1, NUM_BINS + 1))
        for kind in range(len(rows)):
            only_this = np.zeros(len(rows))
            only_this[kind] = 1.0
            _mix_survival(self._events, self._at_risk, rows[None, :], only_this, self._prior, survival)
            likelihoods[kind] = survival[0, last] if truncated else survival[0, last] - survival[0, last + 1]
        self._log_likelihoods = LIKELIHOOD_MEMORY * self._log_likelihoods + np.log(np.maximum(likelihoods, 1e-6))
        self._log_likelihoods -= self._log_likelihoods.max()

    def _row_of(self, kind: int, context: tuple[int, ...]) -> int:
        row = self._row_of_context.get((kind, context))
        if row is None:
            if len(self._row_of_context) >= MAX_CONTEXTS:
                self._drop_rare_contexts()
            row = self._row_of_context[(kind, context)] = len(self._row_of_context)
            if row >= len(self._events):
                self._events = np.pad(self._events, ((0, len(self._events)), (0, 0)))
                self._at_risk = np.pad(self._at_risk, ((0, len(self._at_risk)), (0, 0)))
        return row

    def _drop_rare_contexts(self) -> None:
        """Keep the half of the contexts with the most observations, and always row 0."""
        observed = self._at_risk[: len(self._row_of_context), 0]
        frequent = set(np.argsort(-observed, kind="stable")[: MAX_CONTEXTS // 2].tolist()) | {0}
        kept = [(key, row) for key, row in self._row_of_context.items() if row in frequent]
        rows = [row for _, row in kept]
        events, at_risk = self._events[rows], self._at_risk[rows]
        self._events[:], self._at_risk[:] = 0.0, 0.0
        self._events[: len(rows)], self._at_risk[: len(rows)] = events, at_risk
        self._row_of_context = {key: row for row, (key, _) in enumerate(kept)}
        for index, found in self._contexts.items():
            rows_of_request = [self._row_of_context.get((kind, context), 0) for kind, context in enumerate(found)]
            self._context_rows[index] = rows_of_request

    # ------------------------------------------------------------------------------------------ saving, restoring

    def state(self) -> dict[str, Any]:
        """What the next start should know, as plain data; contexts with almost no weight are left out."""
        known = [(key, row) for key, row in self._row_of_context.items() if self._at_risk[row, 0] >= 0.5]
        return {
            "edges": EDGES.tolist(),
            "observed": self.num_observed,
            "log_weights": self._log_likelihoods.tolist(),
            "below": self._coverage.tolist(),
            "scores": self.regressor.weights.astype(np.float32).tolist(),
            "contexts": [[kind, list(context)] for (kind, context), _ in known],
            "events": [np.round(self._events[row], 3).tolist() for _, row in known],
            "risk": [np.round(self._at_risk[row], 3).tolist() for _, row in known],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned.

        Raises:
            KeyError, TypeError, ValueError: if it has another form.

        """
        if state["edges"] != EDGES.tolist() or len(state["scores"]) != len(self.regressor.weights):
            raise ValueError("other bins or features than this release's")
        events, at_risk = np.array(state["events"], float), np.array(state["risk"], float)
        if len(state["contexts"]) != len(events) or (len(events) and events.shape[1:] != (NUM_BINS,)):
            raise ValueError("contexts and counts do not agree")
        log_likelihoods, coverage = np.array(state["log_weights"], float), np.array(state["below"], float)
        shapes_fit = log_likelihoods.shape == (len(CONTEXT_KINDS),) and coverage.shape == (len(LEVELS),)
        if not shapes_fit or events.shape != at_risk.shape:
            raise ValueError("other kinds of contexts or quantiles than this release's")
        self._log_likelihoods, self._coverage = log_likelihoods, coverage
        self.regressor.weights[:] = state["scores"]
        for (kind, context), ended, reached in zip(state["contexts"], events, at_risk, strict=True):
            row = self._row_of(int(kind), tuple(int(part) for part in context))
            self._events[row], self._at_risk[row] = ended, reached
        self.num_observed = int(state["observed"])
