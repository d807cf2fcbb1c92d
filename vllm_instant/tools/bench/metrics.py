"""What turns are boiled down to: each metric's samples of one turn, and the statistic of many turns' samples."""

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
    """One row's arithmetic."""

    name: str
    unit: str
    better: Direction
    samples: Callable[[ArmRound], np.ndarray | None]
    """Of one turn, ``[samples]`` or ``[1, sums]``; None where the turn does not tell."""
    statistic: Statistic
    least: int = 1
    """Samples below which the statistic says nothing."""
    missing: str = ""
    """Why a turn may not tell."""
    shown: Statistic | None = None
    """What is printed, if it is another statistic than the one that is compared."""


def round_metrics(plan: BenchPlan, price: HourlyPrice | None) -> list[BenchMetric]:
    """The rows of one level of concurrency."""
    rows = [_percentile("TTFT", q, lambda turn: [answer.ttft for answer in turn.answers]) for q in PERCENTILES]
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
    rows.append(_sums("output tokens/s", "tokens/s", "higher", lambda turn: (turn.tokens, turn.seconds)))
    if plan.ttft_slo_ms is not None or plan.itl_slo_ms is not None:
        # Compared with half an answer more than there was: a ratio needs rates that are not zero.
        rows.append(
            BenchMetric(
                f"goodput ({_goals(plan)})",
                "requests/s",
                "higher",
                lambda turn: np.array([[_good(turn, plan), turn.seconds]]),
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
                lambda turn: (turn.seconds / 3600 * price.amount * 1e6, turn.tokens),
            )
        )
    rows.append(
        _sums(
            "energy per token",
            "J",
            "lower",
            lambda turn: None if turn.joules is None else (turn.joules, turn.tokens),
            missing="this machine shows no energy counter of NVML or RAPL",
        )
    )
    return rows


def acceptance_length(kind: str) -> BenchMetric:
    """Tokens a step of a request, steps without drafts included; ``kind`` of prompts."""

    def samples(turn: ArmRound) -> np.ndarray | None:
        answers = [answer for answer in turn.answers if answer.kind == kind]
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
        missing="a server does not say what was accepted (vLLM's --per-request-spec-decode-metrics summary)",
    )


def _percentile(name: str, q: int, values: Callable[[ArmRound], Sequence[float] | np.ndarray]) -> BenchMetric:
    return BenchMetric(
        f"{name} p{q}",
        "ms",
        "lower",
        lambda turn: 1e3 * np.asarray(values(turn), float),
        lambda samples: float(np.percentile(samples, q)),
        least=round(1 / (1 - q / 100)) if q > 50 else 1,
        missing="answers arrived at once",
    )


def _sums(
    name: str, unit: str, better: Direction, pair: Callable[[ArmRound], tuple[float, float] | None], missing: str = ""
) -> BenchMetric:
    def samples(turn: ArmRound) -> np.ndarray | None:
        found = pair(turn)
        return None if found is None else np.array([found], float)

    return BenchMetric(name, unit, better, samples, _quotient, missing=missing)


def _quotient(sums: np.ndarray) -> float:
    return float(sums[:, 0].sum() / max(sums[:, 1].sum(), 1e-9))


def _inter_token_latencies(turn: ArmRound) -> np.ndarray:
    return np.concatenate([answer.inter_token_latencies() for answer in turn.answers])


def _response_times(turn: ArmRound) -> np.ndarray | None:
    times = 1e3 * np.array([answer.seconds_to(RESPONSE_TOKENS) for answer in turn.answers])
    return None if np.isnan(times).any() else times


def _good(turn: ArmRound, plan: BenchPlan) -> int:
    """Answers that kept the goals: time to the first token, mean time between tokens after it."""
    kept = 0
    for answer in turn.answers:
        gaps = answer.inter_token_latencies()
        first = plan.ttft_slo_ms is None or answer.ttft * 1e3 <= plan.ttft_slo_ms
        rest = plan.itl_slo_ms is None or len(gaps) == 0 or float(gaps.mean()) * 1e3 <= plan.itl_slo_ms
        kept += first and rest
    return kept


def _goals(plan: BenchPlan) -> str:
    goals = (("TTFT", plan.ttft_slo_ms), ("ITL", plan.itl_slo_ms))
    return ", ".join(f"{name} ≤ {goal:g} ms" for name, goal in goals if goal is not None)
