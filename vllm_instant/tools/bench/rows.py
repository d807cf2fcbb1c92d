"""The rows of the table: every arm's value, its comparison with the baseline, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from vllm_instant.interfaces.escalation import Depth
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
KV_CACHE, ESCALATION, QUALITY = "KV cache", "escalation", "quality"
"""Groups of rows that are not measured in rounds."""
AGREEMENT = "greedy answers equal to vLLM's"
PERPLEXITY = "perplexity divided by vLLM's"
DIVERGENCE = "KL divergence from vLLM"
LIKELIHOOD = "vLLM's log-probability of sampled answers, minus that of its own"
QUALITY_MARGINS = {AGREEMENT: 0.05, PERPLEXITY: 0.01, DIVERGENCE: 0.01, LIKELIHOOD: 0.1}
"""Stated margins: share of answers, logarithm of perplexity, and twice nats per token."""


@dataclass
class BenchRow:
    """One line of the table."""

    group: str
    name: str
    unit: str
    values: dict[str, Estimate] = field(default_factory=dict)
    """By arm, with 95 % intervals over rounds, prompts or texts; exact quantities have no width."""
    contrasts: dict[str, Contrast] = field(default_factory=dict)
    """By arm that is compared with the baseline."""
    missing: str = ""
    """Why the row has no numbers."""

    def plain(self) -> dict[str, Any]:
        """The row as JSON types."""
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
        """The row that ``plain`` describes."""
        return _ROW.validate_python(plain)


_ROW = TypeAdapter(BenchRow)


def bench_rows(
    plan: BenchPlan,
    state: BenchCheckpoint,
    price: HourlyPrice | None,
    margin: float | None,
    rounds: int | None = None,
) -> list[BenchRow]:
    """All rows of a run.

    Args:
        plan: of the measurement.
        state: the measurements.
        price: per hour.
        margin: the stated margin of the rows that are measured in rounds; None for the plan's own.
        rounds: number of rounds so far; None for those of the plan's first stage.

    """
    made = [_RoundsRow(*planned) for planned in _planned(plan, state, price, rounds or plan.rounds)]
    judged = len(deployed(state.arms)) * (len(made) + 4 * (state.quality is not None))
    stated = margin_for(plan.starts) if margin is None else margin
    found = [one.row(stated, judged, len(plan.stage_ends)) for one in made]
    found += _capacity(state)
    found += _escalation(state, rounds or plan.rounds)
    if state.quality is not None:
        found += _quality(state.quality, FALSE_ALARMS / judged)
    return found


Planned = tuple[str, BenchMetric, Mapping[str, list[ArmRound]], frozenset[str]]
"""Group, metric, rounds by arm, arms that can produce draft tokens."""


def _planned(plan: BenchPlan, state: BenchCheckpoint, price: HourlyPrice | None, rounds: int) -> list[Planned]:
    drafting = frozenset(arm for arm, served in state.served.items() if served["speculates"])
    planned: list[Planned] = []
    everything: dict[str, list[ArmRound]] = {arm: [] for arm in state.arms}
    for users in plan.concurrency:
        by_arm = {arm: [state.arm_rounds[number, users][arm] for number in range(rounds)] for arm in state.arms}
        for arm in state.arms:
            everything[arm] += by_arm[arm]
        planned += [(f"concurrency {users}", metric, by_arm, drafting) for metric in round_metrics(plan, price)]
    for kind in dict.fromkeys(answer.kind for arm_round in everything[BASELINE] for answer in arm_round.answers):
        planned.append(("speculation", acceptance_length(kind), everything, drafting))
    return planned


class _RoundsRow:
    """A row that is measured in rounds."""

    def __init__(
        self, group: str, metric: BenchMetric, by_arm: Mapping[str, list[ArmRound]], drafting: frozenset[str]
    ) -> None:
        self._row = BenchRow(group, metric.name, metric.unit)
        self._better = metric.better
        self._arms: dict[str, ResampledRounds] = {}
        for arm, taken in by_arm.items():
            # A server that cannot speculate takes one step per token.
            known = taken if arm in drafting else [_undrafted(arm_round) for arm_round in taken]
            samples = [metric.samples(arm_round) for arm_round in known]
            told = [sample for sample in samples if sample is not None and len(sample)]
            if len(told) < len(samples):
                self._row.missing = metric.missing
                return
            count = sum(map(len, told))
            if count < metric.min_samples:
                self._row.missing = f"{count} samples; {metric.min_samples} are needed"
                return
            self._arms[arm] = found = resample_rounds(told, metric.statistic)
            shown = found if metric.shown is None else resample_rounds(told, metric.shown)
            low, high = np.quantile(shown.draws, [FALSE_ALARMS / 2, 1 - FALSE_ALARMS / 2])
            self._row.values[arm] = Estimate(shown.value, float(low), float(high))

    def row(self, margin: float, comparisons: int, looks: int) -> BenchRow:
        """The finished row, given the number of rows with a verdict and of looks at the data."""
        for arm in deployed(list(self._arms)) if not self._row.missing else ():
            if self._row.values[arm].mean == self._row.values[BASELINE].mean == 0:
                continue  # 0 of 0 has no ratio
            contrast = ratio_contrast(
                self._arms[arm],
                self._arms[BASELINE],
                self._arms[BASELINE_AGAIN],
                better=self._better,
                margin=margin,
                comparisons=comparisons,
                looks=looks,
            )
            if contrast is not None:
                self._row.contrasts[arm] = contrast
        return self._row


def _undrafted(arm_round: ArmRound) -> ArmRound:
    return replace(arm_round, answers=[replace(answer, accepted=0) for answer in arm_round.answers])


def _capacity(state: BenchCheckpoint) -> list[BenchRow]:
    quantities: list[tuple[str, str, str, Direction]] = [
        ("KV-cache bytes per token", "B", "kv_bytes_per_token", "lower"),
        ("concurrent sequences of full length", "sequences", "kv_sequences", "higher"),
    ]
    found = []
    for name, unit, key, better in quantities:
        row = BenchRow(KV_CACHE, name, unit)
        values = {arm: state.served[arm][key] for arm in state.arms}
        if all(values.values()):
            row.values = {arm: Estimate(value, value, value) for arm, value in values.items()}
            for arm in deployed(state.arms):
                row.contrasts[arm] = exact_contrast(
                    values[arm], values[BASELINE], values[BASELINE_AGAIN], better=better, margin=CAPACITY_MARGIN
                )
        else:
            row.missing = "a server's metrics lack it"
        found.append(row)
    return found


def _escalation(state: BenchCheckpoint, rounds: int) -> list[BenchRow]:
    """What the deep end did, of deployments that escalate requests; its answers are in all other rows as well."""
    rows = [
        BenchRow(ESCALATION, "answers of the deep end", "share"),
        BenchRow(ESCALATION, "TTFT p50, deep end", "ms"),
        BenchRow(ESCALATION, "TTFT p50, fast end", "ms"),
    ]
    for arm in deployed(state.arms):
        answers = [
            [answer for (number, _), arms in state.arm_rounds.items() if number == this for answer in arms[arm].answers]
            for this in range(rounds)
        ]
        if not any(answer.answered_by for of_round in answers for answer in of_round):
            continue
        ends = [
            [[1e3 * answer.ttft for answer in of_round if answer.answered_by == end] for of_round in answers]
            for end in (Depth.DEEP, Depth.FAST)
        ]
        shares = np.array([[len(deep), len(every)] for deep, every in zip(ends[0], answers, strict=True)], float)
        rows[0].values[arm] = estimate(shares, lambda sums: sums[:, 0] / sums[:, 1])
        for row, of_end in zip(rows[1:], ends, strict=True):
            samples = [np.array(of_round) for of_round in of_end if of_round]
            if samples:
                found = resample_rounds(samples, lambda times: float(np.median(times)))
                low, high = np.quantile(found.draws, [FALSE_ALARMS / 2, 1 - FALSE_ALARMS / 2])
                row.values[arm] = Estimate(found.value, float(low), float(high))
    return [row for row in rows if row.values]


def _quality(measured: Mapping[str, Any], probability: float) -> list[BenchRow]:
    """The quality rows; ``probability`` is that of a false alarm in one of them."""
    arms = {arm: {key: np.array(values) for key, values in one.items()} for arm, one in measured.items()}
    rows = {
        name: BenchRow(QUALITY, name, unit)
        for name, unit in (
            (AGREEMENT, "share"),
            (PERPLEXITY, "ratio"),
            (DIVERGENCE, "nats/token"),
            (LIKELIHOOD, "nats/token"),
        )
    }
    for arm, one in arms.items():
        rows[AGREEMENT].values[arm] = estimate(one["same"][:, None], _mean(len(one["same"])))
        rows[PERPLEXITY].values[arm] = estimate(one["losses"], quality.perplexity_ratio)
        rows[DIVERGENCE].values[arm] = estimate(one["losses"], quality.divergence)
        rows[LIKELIHOOD].values[arm] = estimate(one["gaps"][:, None], _mean(len(one["gaps"])))
    again = arms[BASELINE_AGAIN]

    def log_perplexity_ratio(sums: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(quality.perplexity_ratio(sums)))

    for arm in deployed(list(arms)):
        one = arms[arm]
        fewer = (one["same"] - again["same"])[:, None]
        cases: list[tuple[str, np.ndarray, Any, Estimate, Direction]] = [
            (AGREEMENT, fewer, _mean(len(fewer)), Estimate(0.0, 0.0, 0.0), "higher"),
            (PERPLEXITY, one["losses"], log_perplexity_ratio, estimate(again["losses"], log_perplexity_ratio), "lower"),
            (DIVERGENCE, one["losses"], quality.divergence, rows[DIVERGENCE].values[BASELINE_AGAIN], "same"),
            (
                LIKELIHOOD,
                one["gaps"][:, None],
                _mean(len(one["gaps"])),
                rows[LIKELIHOOD].values[BASELINE_AGAIN],
                "same",
            ),
        ]
        for name, samples, statistic, floor, better in cases:
            rows[name].contrasts[arm] = difference_contrast(
                estimate(samples, statistic),
                # Enough resamples for the quantiles of a small probability.
                estimate(samples, statistic, confidence=1 - probability, draws=20_000),
                floor,
                better=better,
                margin=QUALITY_MARGINS[name],
            )
    return list(rows.values())


def _mean(count: int) -> Any:
    return lambda sums: sums[:, 0] / count


def verdicts(found: Sequence[BenchRow], arm: str = OURS) -> dict[str, int]:
    """Number of rows by verdict."""
    counts = {"better": 0, "worse": 0, "same": 0, "undecided": 0, "not measured": 0}
    for row in found:
        counts[row.contrasts[arm].verdict if arm in row.contrasts else "not measured"] += 1
    return counts


def rounds_to_decide(found: Sequence[BenchRow]) -> int | None:
    """About how many further rounds would decide all rows that rounds can decide; None where there are none."""
    needed = [contrast.rounds_to_decide() for row in found for contrast in row.contrasts.values()]
    return max((number for number in needed if number is not None), default=None)
