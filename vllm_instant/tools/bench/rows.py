"""The rows of the table: every arm's value, how it compares with stock, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vllm_instant.tools.bench.checkpoint import BenchCheckpoint
from vllm_instant.tools.bench.metrics import BenchMetric, acceptance_length, round_metrics
from vllm_instant.tools.bench.plan import BASELINE, BASELINE_AGAIN, OURS, BenchPlan, HourlyPrice, deployed
from vllm_instant.tools.measure import quality
from vllm_instant.tools.measure.interleaved_rounds import ArmRound
from vllm_instant.tools.measure.significance import (
    FALSE_ALARMS,
    Contrast,
    Direction,
    ResampledRounds,
    difference_contrast,
    exact_contrast,
    margin_for,
    ratio_contrast,
    resample_rounds,
)
from vllm_instant.tools.measure.statistics import Estimate, estimate

CAPACITY_MARGIN = 0.01
AGREEMENT_MARGIN, PERPLEXITY_MARGIN, DIVERGENCE_MARGIN, LIKELIHOOD_MARGIN = 0.05, 0.01, 0.01, 0.1
"""Stated margins of the quality rows: share of answers, share, nats a token, nats a token."""


@dataclass
class BenchRow:
    """One line of the table."""

    group: str
    name: str
    unit: str
    values: dict[str, Estimate] = field(default_factory=dict)
    """By arm, with 95 % intervals over rounds, prompts or texts; a single value where there is nothing to vary."""
    contrasts: dict[str, Contrast] = field(default_factory=dict)
    """By arm that is compared with stock."""
    missing: str = ""
    """Why there are no numbers."""

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "group": self.group,
            "name": self.name,
            "unit": self.unit,
            "values": {arm: vars(value) for arm, value in self.values.items()},
            "contrasts": {arm: contrast.plain() for arm, contrast in self.contrasts.items()},
            "missing": self.missing,
        }

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> BenchRow:
        """The row that ``plain`` was made from."""
        return cls(
            plain["group"],
            plain["name"],
            plain["unit"],
            {arm: Estimate(**value) for arm, value in plain["values"].items()},
            {arm: Contrast.read(contrast) for arm, contrast in plain["contrasts"].items()},
            plain["missing"],
        )


def bench_rows(
    plan: BenchPlan, state: BenchCheckpoint, price: HourlyPrice | None, margin: float | None
) -> list[BenchRow]:
    """All rows of a run.

    Args:
        plan: what was measured.
        state: what came out.
        price: of an hour.
        margin: the stated margin of the rows that are measured in rounds; None for the one that fits the plan.

    """
    made = [_RoundsRow(*planned) for planned in _planned(plan, state, price)]
    judged = len(deployed(state.arms)) * (len(made) + 4 * (state.quality is not None))
    stated = margin_for(plan.starts) if margin is None else margin
    found = [one.row(stated, judged) for one in made]
    found += _capacity(state)
    if state.quality is not None:
        found += _quality(state.quality, FALSE_ALARMS / judged)
    return found


Planned = tuple[str, BenchMetric, Mapping[str, list[ArmRound]], frozenset[str]]
"""Group, arithmetic, turns by arm, arms that can have draft tokens."""


def _planned(plan: BenchPlan, state: BenchCheckpoint, price: HourlyPrice | None) -> list[Planned]:
    drafting = frozenset(arm for arm, served in state.served.items() if served["speculates"])
    planned: list[Planned] = []
    everything: dict[str, list[ArmRound]] = {arm: [] for arm in state.arms}
    for users in plan.concurrency:
        turns = {arm: [state.turns[number, users][arm] for number in range(plan.rounds)] for arm in state.arms}
        for arm in state.arms:
            everything[arm] += turns[arm]
        planned += [(f"concurrency {users}", metric, turns, drafting) for metric in round_metrics(plan, price)]
    for kind in dict.fromkeys(answer.kind for turn in everything[BASELINE] for answer in turn.answers):
        planned.append(("speculation", acceptance_length(kind), everything, drafting))
    return planned


class _RoundsRow:
    """A row that is measured in rounds."""

    def __init__(
        self, group: str, metric: BenchMetric, turns: Mapping[str, list[ArmRound]], drafting: frozenset[str]
    ) -> None:
        self._row = BenchRow(group, metric.name, metric.unit)
        self._better = metric.better
        self._arms: dict[str, ResampledRounds] = {}
        for arm, taken in turns.items():
            # A server that cannot speculate takes a step for each token.
            known = taken if arm in drafting else [_undrafted(turn) for turn in taken]
            samples = [metric.samples(turn) for turn in known]
            told = [sample for sample in samples if sample is not None and len(sample)]
            if len(told) < len(samples):
                self._row.missing = metric.missing
                return
            count = sum(map(len, told))
            if count < metric.least:
                self._row.missing = f"{count} samples; {metric.least} are needed"
                return
            self._arms[arm] = found = resample_rounds(told, metric.statistic)
            shown = found if metric.shown is None else resample_rounds(told, metric.shown)
            low, high = np.quantile(shown.draws, [FALSE_ALARMS / 2, 1 - FALSE_ALARMS / 2])
            self._row.values[arm] = Estimate(shown.value, float(low), float(high))

    def row(self, margin: float, comparisons: int) -> BenchRow:
        """The row, when it is known how many get a verdict."""
        for arm in deployed(list(self._arms)) if not self._row.missing else ():
            if self._row.values[arm].mean == self._row.values[BASELINE].mean == 0:
                continue  # two rates of nothing
            contrast = ratio_contrast(
                self._arms[arm],
                self._arms[BASELINE],
                self._arms[BASELINE_AGAIN],
                better=self._better,
                margin=margin,
                comparisons=comparisons,
            )
            if contrast is not None:
                self._row.contrasts[arm] = contrast
        return self._row


def _undrafted(turn: ArmRound) -> ArmRound:
    return replace(turn, answers=[replace(answer, accepted=0) for answer in turn.answers])


def _capacity(state: BenchCheckpoint) -> list[BenchRow]:
    quantities: list[tuple[str, str, str, Direction]] = [
        ("KV-cache bytes per token", "B", "kv_bytes_per_token", "lower"),
        ("concurrent sequences of full length", "sequences", "kv_sequences", "higher"),
    ]
    found = []
    for name, unit, key, better in quantities:
        row = BenchRow("KV cache", name, unit)
        values = {arm: state.served[arm][key] for arm in state.arms}
        if all(values.values()):
            row.values = {arm: Estimate(value, value, value) for arm, value in values.items()}
            for arm in deployed(state.arms):
                row.contrasts[arm] = exact_contrast(
                    values[arm], values[BASELINE], values[BASELINE_AGAIN], better=better, margin=CAPACITY_MARGIN
                )
        else:
            row.missing = "a server does not say it in its metrics"
        found.append(row)
    return found


def _quality(measured: Mapping[str, Any], chance: float) -> list[BenchRow]:
    agreement = BenchRow("quality", "greedy answers equal to stock's", "share")
    perplexity = BenchRow("quality", "perplexity by stock's", "ratio")
    divergence = BenchRow("quality", "KL divergence from stock", "nats/token")
    likelihood = BenchRow("quality", "stock's log-probability of sampled answers, less of its own", "nats/token")
    arms = {arm: {key: np.array(values) for key, values in one.items()} for arm, one in measured.items()}
    again = arms[BASELINE_AGAIN]
    for arm, one in arms.items():
        agreement.values[arm] = estimate(one["same"][:, None], _mean(len(one["same"])))
        perplexity.values[arm] = estimate(one["losses"], quality.perplexity_ratio)
        divergence.values[arm] = estimate(one["losses"], quality.divergence)
        likelihood.values[arm] = estimate(one["gaps"][:, None], _mean(len(one["gaps"])))
    for arm in deployed(list(arms)):
        one = arms[arm]
        less = (one["same"] - again["same"])[:, None]
        nothing = Estimate(0.0, 0.0, 0.0)
        agreement.contrasts[arm] = _difference(less, _mean(len(less)), nothing, chance, "higher", AGREEMENT_MARGIN)
        log_ratio = _difference(
            one["losses"],
            lambda sums: np.log(quality.perplexity_ratio(sums)),
            estimate(again["losses"], lambda sums: np.log(quality.perplexity_ratio(sums))),
            chance,
            "lower",
            PERPLEXITY_MARGIN,
        )
        perplexity.contrasts[arm] = log_ratio
        divergence.contrasts[arm] = _difference(
            one["losses"], quality.divergence, divergence.values[BASELINE_AGAIN], chance, "same", DIVERGENCE_MARGIN
        )
        likelihood.contrasts[arm] = _difference(
            one["gaps"][:, None],
            _mean(len(one["gaps"])),
            likelihood.values[BASELINE_AGAIN],
            chance,
            "same",
            LIKELIHOOD_MARGIN,
        )
    return [agreement, perplexity, divergence, likelihood]


def _difference(
    samples: np.ndarray, statistic: Any, floor: Estimate, chance: float, better: Direction, margin: float
) -> Contrast:
    return difference_contrast(
        estimate(samples, statistic),
        # As many draws as such a small chance needs.
        estimate(samples, statistic, confidence=1 - chance, draws=20_000),
        floor,
        better=better,
        margin=margin,
    )


def _mean(count: int) -> Any:
    return lambda sums: sums[:, 0] / count


def verdicts(found: Sequence[BenchRow], arm: str = OURS) -> dict[str, int]:
    """How many rows got which verdict."""
    counts = {"better": 0, "worse": 0, "no difference": 0, "not measured": 0}
    for row in found:
        counts[row.contrasts[arm].verdict if arm in row.contrasts else "not measured"] += 1
    return counts
