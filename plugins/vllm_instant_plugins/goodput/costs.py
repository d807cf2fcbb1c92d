"""The time of an engine step on this deployment, learned from the steps that were run.

The time of a step is modelled as a sum: a piecewise-linear function of the rows (tokens) that go through the target
model, a term for the context that attention reads, and the drafter's time, which depends on how many tokens it drafts
one after the other and for how many requests. About the shape of the first function it is only assumed that
neighbouring sizes take similar times, because real curves have steps (padded CUDA graphs) and even fall (two tokens can
take longer than three when a library changes its algorithm).

The weights follow a Kalman filter: it gives every estimate its uncertainty, needs no stored history, and forgets by
letting all weights drift, together (the machine became slower) and each by itself. A surprising time moves the estimate
only by a bounded amount, so that an outlier has little effect and a lasting change is learned within some steps: the
scatter of single steps (noise) is separated from a common bias of all recent steps (drift).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.goodput.cost_kernels import (
    describe_step,
    estimate_step,
    learn_costs,
    monotone_curve,
    reference_deviation,
)
from vllm_instant_plugins.goodput.experts import ExpertUse

Array = npt.NDArray[np.float64]

_KNOTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512)
CONTEXT_UNIT = 1024.0
"""Tokens of context per unit of the context weight."""
UNCACHED_UNIT = 128.0
"""The same for tokens that the drafter must read before it drafts."""
_EXTRA = (
    "context",
    "verifying",
    "drafting",
    "drafting rows",
    "draft_steps",
    "pass requests",
    "resuming",
    "uncached_tokens",
    "piecewise",
    "experts",
)

MIN_RECENT = 3.5
RECENT_MEMORY = 0.995
MIN_FALL = 0.08
"""A curve may fall with the rows, by this share or more, between two knots that were measured this often recently."""
FIRST_NOISE = 0.15
"""Relative standard deviation of the first two measurements of a kind of step."""
WARM_UP_STEPS = 5
KEPT_SCALE_DOUBT = 0.5
KEPT_DOUBT = 0.2
MAX_RESTORED_SECONDS = 3600.0
"""Maximum absolute value of a stored coefficient, in seconds."""
MAX_RESTORED_ROWS = 10**9
"""Maximum of a stored number of rows."""
KEPT_NOISE = 0.03
"""Relative standard deviations of stored costs: of all together, of each alone, and the least of a measured step."""
OUTLIER_SIGMAS = 3.0
MAX_RESIDUAL = 0.3
_BIAS_RATE = 0.1
_FREE_BIAS = 0.04
_DRIFT_PER_BIAS = 0.1
"""Common drift per unit of bias beyond that: where all steps take longer, or shorter, the machine has changed."""
_COMMON_DRIFT = 0.01
"""Drift per step of all weights together: other processes come and go, so that only steps near each other compare."""
_OWN_DRIFT = 0.004
_PRIOR_POWER = 0.2
_PRIOR_STEP = 0.15
_PRIOR_EXTRA = (0.02, 0.05, 0.05, 0.001, 0.05, 0.005, 0.01, 0.02, 0.05, 0.5)
"""Standard deviations of the further weights, relative to a step."""
_PRIOR_PIECEWISE = 0.1
"""Time that a step outside of FULL CUDA graphs is assumed to take more, relative to a step."""


class StepCosts:
    """Seconds of a step as a function of what is in it.

    Args:
        max_rows: limit of the tokens in a pure decoding step (requests × (1 + draft tokens)); longer steps, which read
            prompts, are not modelled.

    """

    def __init__(self, max_rows: int) -> None:
        knots = list(_KNOTS)
        while knots[-1] < max_rows:
            knots.append(int(knots[-1] * 1.5))
        self.knots: Array = np.array([1, *(k for k in knots[1:] if k < max_rows), max(max_rows, 2)], float)
        self.max_rows = int(self.knots[-1])
        self.weights: Array = np.zeros(len(self.knots) + len(_EXTRA))
        self._covariance: Array = np.zeros((len(self.weights), len(self.weights)))
        self._noise = 0.05**2
        """Variance of measured times relative to the estimate,"""
        self._bias = 0.0
        """around this: the share of the estimate by which recent steps took longer."""
        self._seen: Counter[tuple[bool, bool]] = Counter()
        """Measured steps by whether they verified drafts, and whether they drafted."""
        self.experts = ExpertUse()
        """Distinct experts of a step; estimates no cost while no step was counted."""
        self.observations = 0
        self._recent: Array = np.zeros(len(self.knots))
        """Recent measurements at each knot; older ones fade."""
        self.max_measured_rows = 0
        """Largest number of rows that was ever measured."""
        self._monotone: Array | None = None
        """What ``at_knots`` returned since the last change of the weights."""

    @property
    def ready(self) -> bool:
        """Whether any step was measured."""
        return self.observations > 0

    def features(
        self,
        rows: float,
        context: float,
        drafts: float,
        draft_steps: float,
        requests: float,
        uncached_tokens: float = 0.0,
        piecewise: bool = False,
    ) -> Array:
        """The feature vector of one step, shape ``[weights]``.

        Args:
            rows: tokens through the target model, drafts included.
            context: tokens of context, over all requests.
            drafts: draft tokens that are verified.
            draft_steps: draft tokens that the drafter makes one after the other for the next step.
            requests: requests that decode.
            uncached_tokens: tokens that the drafter must read first, because it was off when they came.
            piecewise: the step runs outside of the FULL CUDA graphs that the device has for others.

        """
        x = np.zeros(len(self.weights))
        experts = self.experts.share(requests, drafts) if self.experts.counted else 0.0
        describe_step(
            self.knots,
            float(rows),
            context / CONTEXT_UNIT,
            float(drafts),
            float(draft_steps),
            float(requests),
            uncached_tokens / UNCACHED_UNIT,
            float(piecewise),
            float(experts),
            x,
        )
        return x

    def target_seconds(
        self, rows: Array, context: float, requests: float | None = None, as_measured: bool = False
    ) -> Array:
        """Estimates for steps with these rows, without drafter and verification; same shape as ``rows``.

        ``requests``: rows that are no drafts; all of them by default. ``as_measured``: also where the curve falls
        between rows that were not measured recently.
        """
        at_knots = self.weights[: len(self.knots)] if as_measured else self.at_knots()
        curve = np.interp(rows, self.knots, at_knots)
        if self.experts.counted:
            curve += self.expert_seconds(rows, requests)
        seconds: Array = np.maximum(curve + self.context_seconds(context), 1e-6)
        return seconds

    def at_knots(self, sigmas: float = 0.0, requests: float = 1.0) -> Array:
        """Estimates at the knots of rows, without context; they fall with the rows only where both sides are recent.

        Args:
            sigmas: standard deviations below the mean, relative to a step with ``requests`` rows, and not below it.
            requests: rows of a step without drafts.

        Returns:
            Seconds, ``[knots]``; kept and returned again until the next measurement, so not to be written to.

        """
        mean = self._monotone
        if mean is None:
            self._monotone = mean = np.empty(len(self.knots))
            monotone_curve(self.weights, self._covariance, self._recent, MIN_RECENT, MIN_FALL, mean)
        if not sigmas:
            return mean
        baseline = int(np.searchsorted(self.knots, min(requests, self.knots[-1])))
        variance = np.maximum(self._contrast_variance(mean, baseline), 0.0)
        optimistic: Array = mean - sigmas * np.sqrt(variance)
        optimistic[baseline:] = np.maximum(optimistic[baseline:], np.minimum(mean[baseline:], mean[baseline]))
        return optimistic

    def _contrast_variance(self, mean: Array, baseline: int) -> Array:
        """Variance of each knot's time given the time at knot ``baseline``: what all steps share cancels."""
        count = len(self.knots)
        covariance = self._covariance[:count, :count]
        ratio: Array = mean / max(float(mean[baseline]), 1e-9)
        variance: Array = covariance.diagonal() - ratio * (2 * covariance[baseline])
        variance += ratio * ratio * covariance[baseline, baseline]
        return variance

    def recent_measurements(self, rows: float) -> float:
        """Recent measurements of steps with these rows; older ones fade."""
        return float(np.interp(rows, self.knots, self._recent))

    def reference_deviation(
        self,
        rows: float,
        context: float,
        drafts: float,
        draft_steps: float,
        requests: float,
        piecewise: bool = False,
        baseline_piecewise: bool = False,
    ) -> float:
        """By how much one measured step without drafts is expected to change its ratio to a step with drafts.

        Args:
            rows: tokens through the target model in the step without drafts.
            context: tokens of context, over all requests.
            drafts: draft tokens beside ``rows``.
            draft_steps: draft tokens that the drafter makes one after the other.
            requests: requests that decode.
            piecewise: the step with drafts runs outside of FULL CUDA graphs.
            baseline_piecewise: the step without drafts does.

        """
        experts = self.experts
        return float(
            reference_deviation(
                self.knots,
                float(rows),
                context / CONTEXT_UNIT,
                float(drafts),
                float(draft_steps),
                float(requests),
                float(piecewise),
                float(baseline_piecewise),
                float(experts.share(requests, drafts)) if experts.counted else 0.0,
                float(experts.share(requests, 0.0)) if experts.counted else 0.0,
                self.weights,
                self._covariance,
                self._noise,
            )
        )

    def expert_seconds(self, rows: Array, requests: float | None) -> Array:
        """Seconds of the distinct experts of steps with these rows, beyond those of the rows; 0 without experts."""
        alone = rows if requests is None else np.minimum(rows, requests)
        worth = max(0.0, float(self.weights[-1]))
        share: Array = self.experts.share(alone, rows - alone)
        return worth * share

    def context_seconds(self, context: float) -> float:
        """Seconds of attention to ``context`` tokens."""
        return float(self.weights[len(self.knots)]) * context / CONTEXT_UNIT

    def verify_seconds(self) -> float:
        """Seconds of verifying any drafts at all, besides those of their rows."""
        return max(0.0, float(self.weights[len(self.knots) + 1]))

    def piecewise_seconds(self) -> float:
        """Seconds that a step takes more where it runs outside of FULL CUDA graphs."""
        return max(0.0, float(self.weights[len(self.knots) + 8]))

    def draft_seconds(self, draft_steps: Array, rows: Array, requests: int) -> Array:
        """Seconds of the drafter, broadcast over ``draft_steps`` (0 is no drafting) and the target's ``rows``."""
        fixed, per_row, per_step, per_step_request = self.draft_weights()
        drafting = fixed + per_row * rows + draft_steps * (per_step + per_step_request * requests)
        seconds: Array = np.where(draft_steps > 0, np.maximum(drafting, 0.0), 0.0)
        return seconds

    def draft_weights(self) -> Array:
        """Seconds of the drafter: fixed, per row of the target, per draft step, per draft step and request."""
        return self.weights[len(self.knots) + 2 : len(self.knots) + 6]

    def catch_up_seconds(self, uncached_tokens: float) -> float:
        """Seconds of a draft model that was off to read ``uncached_tokens`` before it drafts again."""
        fixed, per_token = self.catch_up_weights()
        return float(fixed + per_token * uncached_tokens) if uncached_tokens else 0.0

    def catch_up_weights(self) -> Array:
        """Seconds of the drafter to read uncached tokens: fixed, and per token."""
        weights = self.weights[len(self.knots) + 6 : len(self.knots) + 8] / (1.0, UNCACHED_UNIT)
        return np.maximum(weights, 0.0)

    def estimate(self, x: Array) -> tuple[float, float]:
        """Expected seconds of a step with features ``x`` and their standard deviation, measurement noise excluded."""
        seconds, variance = estimate_step(x, self.weights, self._covariance)
        return seconds, max(0.0, variance) ** 0.5

    def observe(self, x: Array, seconds: float) -> float:
        """Learn from one pure decoding step; returns the error of the estimate, in standard deviations."""
        self._monotone = None
        if not self.ready:
            self._start(x, seconds)
        elif self.observations < WARM_UP_STEPS:
            # The first steps of a server are slower than the later ones: a shorter time corrects the scale of all.
            expected = self.estimate(x)[0]
            if seconds < 0.9 * expected:
                self.weights *= seconds / expected
                self._covariance *= (seconds / expected) ** 2
        self.observations += 1
        self._recent *= RECENT_MEMORY
        self._recent += x[: len(self.knots)]
        noise = self._noise
        if self._is_new(x):
            # The first steps of a kind compile and allocate, and are no measurement of the later ones.
            noise = max(noise, FIRST_NOISE**2)
        surprise, still_off, rows = learn_costs(
            x,
            float(seconds),
            noise,
            OUTLIER_SIGMAS,
            _COMMON_DRIFT + _DRIFT_PER_BIAS * max(0.0, abs(self._bias) - _FREE_BIAS),
            _OWN_DRIFT,
            self.knots,
            self.weights,
            self._covariance,
        )
        self.max_measured_rows = max(self.max_measured_rows, int(rows + 0.5))
        residual = min(max(still_off, -MAX_RESIDUAL), MAX_RESIDUAL)
        self._bias += _BIAS_RATE * (residual - self._bias)
        residual -= self._bias
        rate = max(0.01, 1.0 / (self.observations + 1))
        self._noise = max((1 - rate) * self._noise + rate * residual * residual, 0.005**2)
        return float(surprise)

    def _is_new(self, x: Array) -> bool:
        """Whether this is one of the first two steps with or without drafts, and with or without the drafter."""
        verify, draft = len(self.knots) + 1, len(self.knots) + 2
        kind = bool(x[verify]), bool(x[draft])
        self._seen[kind] += 1
        return self._seen[kind] <= 2

    def _start(self, x: Array, seconds: float) -> None:
        """Prior around the first measured time: drafts look cheap, so that they are tried; everything is uncertain."""
        count = len(self.knots)
        rows = x[:count] @ self.knots
        self.weights[:count] = seconds * (self.knots / rows) ** _PRIOR_POWER
        # A random walk over the knots that starts at the measured one: uncertainty grows with the distance from it.
        offset = np.arange(count) - np.interp(rows, self.knots, np.arange(count))
        distance = np.minimum(np.abs(offset)[:, None], np.abs(offset)[None, :])
        same_side = offset[:, None] * offset[None, :] > 0
        walk = (seconds * _PRIOR_STEP) ** 2 * distance * same_side
        self._covariance[:count, :count] = walk + (seconds * 0.2) ** 2
        for index, share in zip(range(count, len(self.weights)), _PRIOR_EXTRA, strict=True):
            self._covariance[index, index] = (seconds * share) ** 2
        self.weights[count + 8] = seconds * _PRIOR_PIECEWISE

    # ------------------------------------------------------------------------------------------- storing

    def state(self) -> dict[str, Any]:
        """Everything learned, as plain data."""
        return {
            "knots": self.knots.tolist(),
            "weights": self.weights.tolist(),
            "covariance": self._covariance.tolist(),
            "noise": self._noise,
            "observations": self.observations,
            "max_measured_rows": self.max_measured_rows,
        }

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Restore what ``state()`` returned; False, and nothing changes, where it has another size or is damaged."""
        try:
            knots, weights = np.array(state["knots"], float), np.array(state["weights"], float)
            covariance, noise = np.array(state["covariance"], float), float(state["noise"])
            observations, largest = int(state["observations"]), int(state["max_measured_rows"])
        except (KeyError, TypeError, ValueError, OverflowError):
            return False
        fits = np.array_equal(knots, self.knots) and weights.shape == self.weights.shape
        if not fits or covariance.shape != self._covariance.shape:
            return False
        if not (np.isfinite(weights).all() and np.isfinite(covariance).all() and noise > 0):
            return False
        # What no server measures, as from a damaged file: variances below 0, steps of hours, fewer than no steps.
        if np.diag(covariance).min() < 0 or np.abs(weights).max() > MAX_RESTORED_SECONDS:
            return False
        if not (observations >= 0 and 0 <= largest <= MAX_RESTORED_ROWS):
            return False
        # What was measured then may not hold now: on a busier host all steps take longer, and any curve may have
        # changed. The first steps confirm or correct it within this uncertainty.
        doubt = KEPT_DOUBT * np.abs(weights)
        doubt[len(knots) :] = np.maximum(doubt[len(knots) :], np.array(_PRIOR_EXTRA) * weights[0])
        covariance += KEPT_SCALE_DOUBT**2 * np.outer(weights, weights) + np.diag(doubt**2)
        self.weights, self._covariance, self._noise = weights, covariance, max(noise, KEPT_NOISE**2)
        self._monotone = None
        self.observations, self.max_measured_rows = observations, largest
        return True
