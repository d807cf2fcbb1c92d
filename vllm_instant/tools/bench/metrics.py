"""The metrics of rounds: the samples of one round, and the statistic of many rounds' samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_instant.tools.bench.plan import RESPONSE_TOKENS, BenchPlan, HourlyPrice
from vllm_instant.tools.measure.interleaved_rounds import ArmRound
from vllm_instant.tools.measure.significance import Direction, Statistic

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class BenchMetric:
    """How one row is computed."""

    name: str
    unit: str
    better: Direction
    samples: Callable[[ArmRound], np.ndarray | None]
    """From one round, ``[samples]`` or ``[1, sums]``; None where the round lacks them."""
    statistic: Statistic
    min_samples: int = 1
    """Fewer samples do not determine the statistic."""
    missing: str = ""
    """Why a round may lack samples."""
    shown: Statistic | None = None
    """The statistic that is printed, where another one is compared."""


def round_metrics(plan: BenchPlan, price: HourlyPrice | None) -> list[BenchMetric]:
    """The rows of one level of concurrency."""
    rows = [
        _percentile("TTFT", q, lambda arm_round: [answer.ttft for answer in arm_round.answers]) for q in PERCENTILES
    ]
    rows += [_percentile("ITL", q, _inter_token_latencies) for q in PERCENTILES]
    rows.append(
        BenchMetric(
            f"latency of a {RESPONSE_TOKENS}-token response",
            "ms",
            "lower",
            _response_times,
            np.median,
            missing=f"answers are shorter than {RESPONSE_TOKENS} tokens (--tokens)",
        )
    )
    rows.append(_sums("output tokens/s", "tokens/s", "higher", lambda arm_round: (arm_round.tokens, arm_round.seconds)))
    if plan.ttft_slo_ms is not None or plan.itl_slo_ms is not None:
        # Half an answer is added before comparing: a ratio needs rates above zero.
        rows.append(
            BenchMetric(
                f"goodput ({_goals(plan)})",
                "requests/s",
                "higher",
                lambda arm_round: np.array([[_good(arm_round, plan), arm_round.seconds]]),
                lambda sums: float((sums[:, 0].sum() + 0.5) / sums[:, 1].sum()),
                shown=_quotient,
            )
        )
    if price is not None:
        rows.append(
            _sums(
                "cost per million output tokens",
                price.unit,
                "lower",
                lambda arm_round: (arm_round.seconds / 3600 * price.amount * 1e6, arm_round.tokens),
            )
        )
    rows.append(
        _sums(
            "energy per token",
            "J",
            "lower",
            lambda arm_round: None if arm_round.joules is None else (arm_round.joules, arm_round.tokens),
            missing="no energy counter of NVML or RAPL is readable on this machine",
        )
    )
    return rows


def acceptance_length(kind: str) -> BenchMetric:
    """Tokens per step of a request, steps without drafts included; of one ``kind`` of prompts."""

    def samples(arm_round: ArmRound) -> np.ndarray | None:
        answers = [answer for answer in arm_round.answers if answer.kind == kind]
        accepted = [answer.accepted for answer in answers if answer.accepted is not None]
        if len(accepted) < len(answers):
            return None
        tokens = sum(answer.tokens for answer in answers)
        return np.array([[tokens, tokens - sum(accepted)]], float)

    return BenchMetric(
        f"acceptance length, {kind}",
        "tokens/step",
        "higher",
        samples,
        _quotient,
        missing="a server does not report accepted drafts (vLLM's --per-request-spec-decode-metrics summary)",
    )


def _percentile(name: str, q: int, values: Callable[[ArmRound], Sequence[float] | np.ndarray]) -> BenchMetric:
    return BenchMetric(
        f"{name} p{q}",
        "ms",
        "lower",
        lambda arm_round: 1e3 * np.asarray(values(arm_round), float),
        lambda samples: float(np.percentile(samples, q)),
        min_samples=round(1 / (1 - q / 100)) if q > 50 else 1,
        missing="answers arrived in one piece",
    )


def _sums(
    name: str, unit: str, better: Direction, pair: Callable[[ArmRound], tuple[float, float] | None], missing: str = ""
) -> BenchMetric:
    def samples(arm_round: ArmRound) -> np.ndarray | None:
        found = pair(arm_round)
        return None if found is None else np.array([found], float)

    return BenchMetric(name, unit, better, samples, _quotient, missing=missing)


def _quotient(sums: np.ndarray) -> float:
    return float(sums[:, 0].sum() / max(sums[:, 1].sum(), 1e-9))


def _inter_token_latencies(arm_round: ArmRound) -> np.ndarray:
    return np.concatenate([answer.inter_token_latencies() for answer in arm_round.answers])


def _response_times(arm_round: ArmRound) -> np.ndarray | None:
    times = 1e3 * np.array([answer.seconds_to(RESPONSE_TOKENS) for answer in arm_round.answers])
    return None if np.isnan(times).any() else times


def _good(arm_round: ArmRound, plan: BenchPlan) -> int:
    """Number of answers within the goals for time to first token and mean time between tokens."""
    good = 0
    for answer in arm_round.answers:
        gaps = answer.inter_token_latencies()
        first = plan.ttft_slo_ms is None or answer.ttft * 1e3 <= plan.ttft_slo_ms
        rest = plan.itl_slo_ms is None or len(gaps) == 0 or float(gaps.mean()) * 1e3 <= plan.itl_slo_ms
        good += first and rest
    return good


def _goals(plan: BenchPlan) -> str:
    goals = (("TTFT", plan.ttft_slo_ms), ("ITL", plan.itl_slo_ms))
    return ", ".join(f"{name} ≤ {goal:g} ms" for name, goal in goals if goal is not None)
