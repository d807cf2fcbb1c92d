"""Fits a rule: a calibrated logistic regression, and the threshold for a stated loss."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant.escalation.features import features_of, shown_text, words_of
from vllm_instant.escalation.learned_rule import LearnedRule
from vllm_instant.escalation.requests import prompt_text
from vllm_instant.tools.escalation.examples import Example

Floats = npt.NDArray[np.float64]

NUM_FOLDS = 5
MAX_WORDS = 200
MIN_PROMPTS_WITH_WORD = 3
PENALTY = 0.03
"""Inverse strength of the regression's L2 penalty, on standardized features."""
Z = 1.96
"""Quantile of a two-sided 95 % interval."""


def is_deep_better(examples: Sequence[Example]) -> npt.NDArray[np.int64]:
    """1 where the deep answer has the higher score, ``[examples]``."""
    return np.array([int(example.deep_score > example.fast_score) for example in examples])


def fit_rule(examples: Sequence[Example]) -> LearnedRule:
    """Fit the regression and its calibration; the threshold is 0.5 until it is chosen.

    Words are chosen by their chi-squared statistic. The calibration is Platt's, on predictions of five folds.

    Raises:
        ValueError: Too few examples of one kind.

    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    better = is_deep_better(examples)
    if min(better.sum(), len(better) - better.sum()) < NUM_FOLDS:
        raise ValueError("too few prompts of one kind")
    vocabulary = _vocabulary(examples, better)
    positions = {word: number for number, word in enumerate(vocabulary)}
    scaler = StandardScaler()
    features = scaler.fit_transform(np.stack([features_of(example.body, positions) for example in examples]))
    regression = LogisticRegression(C=PENALTY, max_iter=2000)
    calibrated = CalibratedClassifierCV(regression, method="sigmoid", cv=NUM_FOLDS, ensemble=False)
    calibrated.fit(features, better)
    [found] = calibrated.calibrated_classifiers_
    [sigmoid] = found.calibrators
    return LearnedRule(
        vocabulary=vocabulary,
        mean=tuple(map(float, scaler.mean_)),
        scale=tuple(map(float, scaler.scale_)),
        coefficients=tuple(map(float, found.estimator.coef_[0])),
        intercept=float(found.estimator.intercept_[0]),
        slope=float(sigmoid.a_),
        offset=float(sigmoid.b_),
        threshold=0.5,
    )


def _vocabulary(examples: Sequence[Example], better: npt.NDArray[np.int64]) -> tuple[str, ...]:
    from sklearn.feature_selection import chi2

    found = [set(words_of(shown_text(prompt_text(example.body)))) for example in examples]
    counts = Counter(word for words in found for word in words)
    # A word of almost all prompts says nothing, and one of very few is noise.
    limit = len(examples) - MIN_PROMPTS_WITH_WORD
    words = sorted(word for word, count in counts.items() if MIN_PROMPTS_WITH_WORD <= count <= limit)
    if not words:
        return ()
    occurs = np.array([[float(word in here) for word in words] for here in found])
    statistic = np.nan_to_num(chi2(occurs, better)[0])
    chosen = np.argsort(-statistic, kind="stable")[:MAX_WORDS]
    return tuple(sorted(words[number] for number in chosen))


def folds(examples: Sequence[Example], seed: int = 0) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the examples to learn from and the held-out ones; equal prompts are in the same fold."""
    from sklearn.model_selection import StratifiedGroupKFold

    groups = [hashlib.sha256(json.dumps(dict(example.body), sort_keys=True).encode()).digest() for example in examples]
    splitter = StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with few members, for which fit_rule has a sentence
        found = list(splitter.split(examples, is_deep_better(examples), groups))
    for learned, held_out in found:
        yield list(learned), list(held_out)


def held_out_probabilities(examples: Sequence[Example], seed: int = 0) -> Floats:
    """The probability of each example, ``[len(examples)]``, by a rule that has not seen it."""
    probabilities = np.zeros(len(examples))
    for learned, held_out in folds(examples, seed):
        rule = fit_rule([examples[number] for number in learned])
        for number in held_out:
            probabilities[number] = rule.probability(examples[number].body)
    return probabilities


def choose_threshold(probabilities: Floats, gains: Floats, max_loss: float) -> float:
    """The highest threshold whose loss against always deep is at most ``max_loss``, with 95 % confidence.

    Thresholds are tested from the lowest one, which loses nothing, until the first that fails, so that their number
    needs no correction (fixed sequence testing; Angelopoulos et al. 2021, arXiv 2110.01052).

    Args:
        probabilities: Of examples that the rule has not seen, ``[examples]``.
        gains: Score of the deep answer less that of the fast one, ``[examples]``.
        max_loss: Limit of the mean score that is lost.

    """
    chosen = 0.0
    count = len(gains)
    # A threshold between two neighbours decides like any other there; behind the last one nothing goes deep.
    values = np.unique(probabilities)
    candidates = [*((values[:-1] + values[1:]) / 2), min(1.0, float(values[-1]) + 1e-9)] if len(values) else []
    for threshold in candidates:
        losses = np.where(probabilities < threshold, gains, 0.0)
        upper = losses.mean() + Z * losses.std(ddof=1) / np.sqrt(count)
        if upper > max_loss:
            break
        chosen = float(threshold)
    return chosen


def plain(rule: LearnedRule) -> dict[str, Any]:
    """A rule as JSON types."""
    return rule.model_dump(mode="json")
