"""What a rule brings on prompts that it has not seen, beside its baselines at equal cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vllm_instant.escalation.learned_rule import LearnedRule
from vllm_instant.escalation.requests import prompt_text
from vllm_instant.tools.escalation.examples import Example
from vllm_instant.tools.escalation.learning import (
    Floats,
    choose_threshold,
    fit_rule,
    folds,
    held_out_probabilities,
    is_deep_better,
)

MIN_EXAMPLES = 50
DRAWS = 1000
"""Bootstrap samples of an interval."""
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Range:
    """A mean over prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Point:
    """A share of deep answers, and the mean score of each way to choose them."""

    share: float
    cost: float
    learned: Range
    random_mix: Range
    length: Range


@dataclass(frozen=True)
class Report:
    """A rule on held-out prompts."""

    num_prompts: int
    num_deep_better: int
    cost: str
    """What costs are."""
    fast: Range
    deep: Range
    fast_cost: float
    deep_cost: float
    threshold: float
    """Of the rule that is learned from all prompts; that of the judged rule where there is one."""
    share: float
    """Share of deep answers of the rule."""
    rule: Range
    rule_cost: float
    loss: Range
    """Mean score that always deep has more."""
    over_random_mix: Range
    over_length: Range
    """Mean score that the rule has more than the baseline at equal cost."""
    reasons: tuple[str, ...]
    """Why it is not recommended; empty where it is."""
    frontier: tuple[Point, ...] = field(default=())

    def plain(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)


class _Prompts:
    """Scores, costs and lengths of prompts, as columns."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.fast = np.array([example.fast_score for example in examples])
        self.deep = np.array([example.deep_score for example in examples])
        self.fast_cost = np.array([example.fast_cost for example in examples])
        self.deep_cost = np.array([example.deep_cost for example in examples])
        self.length = np.array([float(len(prompt_text(example.body))) for example in examples])

    def score(self, deep: Floats, rows: Any = slice(None)) -> float:
        """Mean score with these probabilities of deep answers."""
        return float((self.fast[rows] + deep * (self.deep - self.fast)[rows]).mean())

    def expense(self, deep: Floats, rows: Any = slice(None)) -> float:
        return float((self.fast_cost[rows] + deep * (self.deep_cost - self.fast_cost)[rows]).mean())

    def mix(self, cost: float, rows: Any = slice(None)) -> Floats:
        """The same probability of a deep answer for each prompt, at a mean cost."""
        fast, deep = self.fast_cost[rows].mean(), self.deep_cost[rows].mean()
        share = 0.0 if deep <= fast else float(np.clip((cost - fast) / (deep - fast), 0, 1))
        return np.full(len(self.fast[rows]), share)

    def first(self, order: Floats, cost: float, rows: Any = slice(None)) -> Floats:
        """Deep answers for the prompts with the highest values of ``order``, up to a mean cost."""
        values, extra = order[rows], (self.deep_cost - self.fast_cost)[rows]
        budget = (cost - self.fast_cost[rows].mean()) * len(values)
        # Prompts of equal value share what is left for them.
        levels, level = np.unique(-values, return_inverse=True)
        of_level = np.bincount(level, weights=extra, minlength=len(levels))
        before = np.concatenate([[0.0], np.cumsum(of_level)[:-1]])
        share = np.clip((budget - before) / np.maximum(of_level, 1e-12), 0, 1)
        return np.asarray(share[level])


def judge(examples: Sequence[Example], cost: str, max_loss: float, rule: LearnedRule | None = None) -> Report:
    """Judge a given rule, or the rule that would be learned from these prompts, on prompts that it has not seen.

    Args:
        examples: The prompts. Where a rule is given it must not have been learned from them.
        cost: What their costs are.
        max_loss: Limit of the loss for which a threshold is chosen.
        rule: A rule with its threshold; None to learn in folds.

    Raises:
        ValueError: With one sentence, where there are too few prompts to learn from.

    """
    check_examples(examples)
    gains = np.array([example.deep_score - example.fast_score for example in examples])
    if rule is None:
        probabilities = np.zeros(len(examples))
        is_deep = np.zeros(len(examples))
        for learned, held_out in folds(examples):
            part = [examples[number] for number in learned]
            threshold = choose_threshold(held_out_probabilities(part, seed=1), gains[learned], max_loss)
            fitted = fit_rule(part)
            for number in held_out:
                probabilities[number] = fitted.probability(examples[number].body)
                is_deep[number] = float(probabilities[number] >= threshold)
        threshold = choose_threshold(probabilities, gains, max_loss)
    else:
        probabilities = np.array([rule.probability(example.body) for example in examples])
        threshold = rule.threshold
        is_deep = (probabilities >= threshold).astype(np.float64)
    return _report(_Prompts(examples), cost, max_loss, probabilities, is_deep, threshold)


def check_examples(examples: Sequence[Example]) -> None:
    """Raise ValueError, with one sentence, where there are too few prompts."""
    better = int(is_deep_better(examples).sum()) if examples else 0
    if len(examples) < MIN_EXAMPLES:
        raise ValueError(f"{len(examples)} prompts are too few: at least {MIN_EXAMPLES} are needed")
    if not 10 <= better <= len(examples) - 10:
        raise ValueError(
            f"the deep answer is better for {better} of {len(examples)} prompts: at least 10 of both kinds are needed"
        )


def _report(
    prompts: _Prompts, cost: str, max_loss: float, probabilities: Floats, is_deep: Floats, threshold: float
) -> Report:
    count = len(is_deep)
    picks = np.random.default_rng(0).integers(0, count, (DRAWS, count))

    def interval(of: Callable[[Any], float]) -> Range:
        values = [of(rows) for rows in picks]
        low, high = np.quantile(values, [0.025, 0.975])
        return Range(of(np.arange(count)), float(low), float(high))

    def spent(rows: Any) -> float:
        return prompts.expense(is_deep[rows], rows)

    def rule(rows: Any) -> float:
        return prompts.score(is_deep[rows], rows)

    everything = np.arange(count)
    order = _better_direction(prompts, spent(everything))
    nothing, all_deep = np.zeros(count), np.ones(count)
    found = Report(
        num_prompts=count,
        num_deep_better=int((prompts.deep > prompts.fast).sum()),
        cost=cost,
        fast=interval(lambda rows: prompts.score(nothing, rows)),
        deep=interval(lambda rows: prompts.score(all_deep, rows)),
        fast_cost=prompts.expense(nothing),
        deep_cost=prompts.expense(all_deep),
        threshold=threshold,
        share=float(is_deep.mean()),
        rule=interval(rule),
        rule_cost=spent(everything),
        loss=interval(lambda rows: prompts.score(all_deep, rows) - rule(rows)),
        over_random_mix=interval(lambda rows: rule(rows) - prompts.score(prompts.mix(spent(rows), rows), rows)),
        over_length=interval(lambda rows: rule(rows) - prompts.score(prompts.first(order, spent(rows), rows), rows)),
        reasons=(),
        frontier=tuple(_frontier(prompts, probabilities, order, interval)),
    )
    return Report(**{**vars(found), "reasons": tuple(_reasons(found, max_loss))})


def _better_direction(prompts: _Prompts, cost: float) -> Floats:
    """The prompts' lengths, negative where short prompts first is the better baseline."""
    both = [prompts.length, -prompts.length]
    return max(both, key=lambda order: prompts.score(prompts.first(order, cost)))


def _frontier(
    prompts: _Prompts, probabilities: Floats, order: Floats, interval: Callable[[Callable[[Any], float]], Range]
) -> list[Point]:
    points = []
    lowest, highest = prompts.fast_cost.mean(), prompts.deep_cost.mean()

    def along(share: float, values: Floats | None) -> Range:
        def of(rows: Any) -> float:
            fast, deep = prompts.fast_cost[rows].mean(), prompts.deep_cost[rows].mean()
            cost = fast + share * (deep - fast)
            chosen = prompts.mix(cost, rows) if values is None else prompts.first(values, cost, rows)
            return prompts.score(chosen, rows)

        return interval(of)

    for share in SHARES:
        cost = float(lowest + share * (highest - lowest))
        points.append(Point(share, cost, along(share, probabilities), along(share, None), along(share, order)))
    return points


def _reasons(found: Report, max_loss: float) -> list[str]:
    reasons = []
    if found.deep_cost <= found.fast_cost:
        reasons.append("the deep end costs no more than the fast one: compare both ends alone")
    if found.share in (0.0, 1.0):
        end = "fast" if found.share == 0 else "deep"
        reasons.append(f"with a loss of at most {max_loss:g} the rule answers everything {end}")
    else:
        for name, gain in (("a random mix", found.over_random_mix), ("the prompt's length", found.over_length)):
            if gain.low <= 0:
                reasons.append(f"at equal cost it does not beat {name}: {gain} more")
    if found.loss.low > max_loss:
        reasons.append(f"it loses {found.loss} against always deep, more than {max_loss:g}")
    return reasons
