"""Do two servers sample from the same distribution? A permutation test of the joint distribution of tokens.

Two arms sample ``n`` tokens after the same prompts, thousands of times. Their outcomes are counted in cells, and the
statistic is compared with its distribution under random permutations of the arms' labels. The false-alarm rate is
therefore the stated one for every distribution and every choice of cells, because cells are made from the samples of
both arms without their labels.

Views: for each position ``m`` the token there alone, and the joint outcome of the first ``m`` tokens. In each view a
prompt's common outcomes have cells of their own, and rare ones share a few cells by their hash. A view's statistic is
the standardised two-sample chi-square over all prompts; the test statistic is the maximum over all views (Westfall and
Young 1993), so that many views cause no additional false alarms.

``scipy.stats.permutation_test`` would evaluate a Python function per permutation; here a batch of permutations is one
matrix product, and the number of permutations is chosen sequentially.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import chi2, ncx2

Tokens = npt.NDArray[np.int64]
COMMON = 12
"""Minimum number of pooled samples for an outcome to have a cell of its own."""
SHARED_CELLS = 8
BATCH = 500
"""Number of permutations per matrix product."""
POWER = 0.9


@dataclass(frozen=True)
class Agreement:
    """The result of the test."""

    p_value: float
    draws: int
    """Number of samples per arm, all prompts together."""
    detectable: float
    """The smallest total variation between the arms' outcomes (as counted in cells, in every prompt) that this test
    detects with a probability of 90 %."""
    distance: float
    """Estimated upper bound of the total variation of the arms' outcomes (all tokens jointly, as counted in cells, mean
    over prompts): from the excess of chi-square over its expectation. 0 without excess."""
    worst_view: str
    """The view with the largest difference."""


def compare_draws(
    ours: Sequence[Tokens],
    theirs: Sequence[Tokens],
    *,
    false_alarms: float = 1e-3,
    max_permutations: int = 20_000,
    seed: int = 0,
) -> Agreement:
    """Test whether the arms agree.

    Args:
        ours: for each prompt int64 ``[draws, n]``.
        theirs: the same prompts of the other arm; the numbers of draws may differ.
        false_alarms: the rate of the caller's decision; permutations end when the p-value is clearly above or below.
        max_permutations: limit of their number.
        seed: of the permutations.

    Raises:
        ValueError: without samples, or when the arms have different prompts or numbers of tokens.

    """
    if (
        not ours
        or len(ours) != len(theirs)
        or any(len(a) == 0 or len(b) == 0 for a, b in zip(ours, theirs, strict=True))
    ):
        raise ValueError("both arms need draws for the same prompts")
    if len({draws.shape[1] for draws in (*ours, *theirs)}) != 1:
        raise ValueError("all draws must have the same number of tokens")
    prompts = [_PromptCells(a, b) for a, b in zip(ours, theirs, strict=True)]
    names = _view_names(ours[0].shape[1])
    observed = np.sum([prompt.chi_squares(prompt.labels[None, :]) for prompt in prompts], axis=0)
    freedom = np.sum([prompt.freedom for prompt in prompts], axis=0)
    scale = np.sqrt(2 * np.maximum(freedom, 1))
    standing = ((observed - freedom) / scale)[:, 0]
    highest = float(standing.max())

    generator = np.random.default_rng(seed)
    tried = exceeded = 0
    while tried < max_permutations:
        permuted = np.sum([prompt.chi_squares(prompt.shuffled(generator, BATCH)) for prompt in prompts], axis=0)
        exceeded += int((((permuted - freedom) / scale).max(0) >= highest - 1e-9).sum())
        tried += BATCH
        # Sequential Monte Carlo p-values (Besag and Clifford 1991): stop when the side of the rate is decided.
        if (exceeded >= 20 and exceeded / tried > 5 * false_alarms) or (exceeded + 1) / (tried + 1) < false_alarms / 4:
            break
    effective = effective_draws(ours, theirs)
    return Agreement(
        p_value=(exceeded + 1) / (tried + 1),
        draws=sum(len(draws) for draws in ours),
        detectable=detectable(effective, int(freedom[-1, 0]), false_alarms / len(names)),
        distance=float(np.sqrt(max(0.0, float((observed - freedom)[-1, 0])) / effective)),
        worst_view=names[int(standing.argmax())],
    )


def effective_draws(ours: Sequence[Tokens], theirs: Sequence[Tokens]) -> float:
    """``sum 4ab / (a + b)`` over prompts with ``a`` and ``b`` draws.

    Multiplied by the square of a total variation, it is the minimum noncentrality of the two-sample chi-square.
    """
    return float(sum(4 * len(a) * len(b) / (len(a) + len(b)) for a, b in zip(ours, theirs, strict=True)))


def detectable(effective_draws: float, freedom: int, false_alarms: float) -> float:
    """The smallest total variation that a chi-square test detects with probability ``POWER``.

    A total variation of ``d`` has, however it is spread over cells, a noncentrality of at least ``d**2`` times
    ``effective_draws`` (by Cauchy's inequality; equality where half of the probability rises and half falls).

    Args:
        effective_draws: see ``effective_draws``.
        freedom: degrees of freedom.
        false_alarms: the test's rate.

    """
    freedom = max(freedom, 1)
    critical = chi2.isf(false_alarms, freedom)
    needed = brentq(lambda x: ncx2.sf(critical, freedom, x) - POWER, 1e-6, 1e6)
    return float(min(1.0, np.sqrt(needed / effective_draws)))


class _PromptCells:
    """The outcomes of both arms after one prompt, in cells."""

    def __init__(self, ours: Tokens, theirs: Tokens) -> None:
        pooled = np.concatenate([ours, theirs])
        self.labels = np.concatenate([np.ones(len(ours), np.float32), np.zeros(len(theirs), np.float32)])
        self.share = len(ours) / len(pooled)
        self._cells = [_one_hot(view) for view in _views(pooled)]
        self._totals = [cells.sum(0) for cells in self._cells]
        self.freedom = np.array([[cells.shape[1] - 1] for cells in self._cells], float)

    def shuffled(self, generator: np.random.Generator, count: int) -> npt.NDArray[np.float32]:
        """``count`` random permutations of the labels, ``[count, draws]``."""
        return generator.permuted(np.tile(self.labels, (count, 1)), axis=1)

    def chi_squares(self, labels: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """The two-sample statistic of each view for each labelling, ``[views, labellings]``."""
        result = np.empty((len(self._cells), len(labels)))
        for view, (cells, totals) in enumerate(zip(self._cells, self._totals, strict=True)):
            expected = totals * self.share
            gaps = labels @ cells - expected
            result[view] = (gaps**2 / (expected * (1 - self.share))).sum(1)
        return result


def _view_names(length: int) -> list[str]:
    return [f"token {m + 1}" for m in range(length)] + [f"tokens 1 to {m + 1}" for m in range(1, length)]


def _views(tokens: Tokens) -> list[npt.NDArray[np.int64]]:
    """Outcome numbers ``[draws]`` of each view, in the order of ``_view_names``."""
    length = tokens.shape[1]
    joint = [_numbered(tokens[:, : m + 1]) for m in range(1, length)]
    return [_numbered(tokens[:, m : m + 1]) for m in range(length)] + joint


def _numbered(outcomes: Tokens) -> npt.NDArray[np.int64]:
    """A cell number for each row: one per common outcome, shared ones for rare outcomes."""
    unique, which, counts = np.unique(outcomes, axis=0, return_inverse=True, return_counts=True)
    shared = np.array([zlib.crc32(row.tobytes()) % SHARED_CELLS for row in unique])
    own = SHARED_CELLS + np.arange(len(unique))
    return np.where(counts >= COMMON, own, shared)[which.reshape(-1)]


def _one_hot(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    unique, which = np.unique(numbers, return_inverse=True)
    cells = np.zeros((len(numbers), len(unique)), np.float32)
    cells[np.arange(len(numbers)), which.reshape(-1)] = 1
    return cells
