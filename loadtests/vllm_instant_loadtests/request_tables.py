"""Tables about the requests of one server: by kind of traffic, by turn of a session, by session, by accepted drafts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_instant.tools.measure import server_metrics as m
from vllm_instant_loadtests.metric_series import MetricSeries, TimeSpan
from vllm_instant_loadtests.run_recorder import RecordedRequest

MIN_JOINED = 20
"""Minimum number of requests that report accepted drafts, for saying what they have to do with latency."""
SLOWEST = 10
"""Number of slow requests that are listed with their accepted drafts."""


@dataclass(frozen=True)
class RequestGroup:
    """Some requests of a server, in milliseconds; NaN where nothing was measured."""

    name: str
    requests: int
    failed: int
    ttft_p50: float
    ttft_p99: float
    answer_p50: float
    """Time to the first token after the thinking ones; equal to TTFT where a model does not think."""
    itl_mean: float
    e2e_p50: float
    e2e_p99: float
    prompt_tokens: float
    """Mean."""
    tokens_per_second: float
    """Output tokens per second of one answer, between its first and its last arrival."""
    acceptance_length: float
    """Tokens per step of a request; 1 without drafts."""


@dataclass(frozen=True)
class SessionTimes:
    """Whole sessions, in seconds."""

    sessions: int
    turns: float
    """Mean number per session."""
    p50: float
    """From the first request to the end of the last answer."""
    p99: float
    waiting: float
    """Mean time per session in which its user waited for first tokens."""


@dataclass(frozen=True)
class AcceptanceEffect:
    """What accepted drafts have to do with the pace of an answer, request by request."""

    requests: int
    correlation: float
    """Spearman's, of tokens per step and the mean time between tokens; negative where rejected drafts cost time."""
    low: tuple[float, float]
    """Of the third of the requests with the fewest tokens per step: tokens per step, mean ITL in milliseconds."""
    high: tuple[float, float]
    """The same of the third with the most."""
    slowest: list[dict[str, Any]]
    """The requests with the highest mean ITL: ``id``, ``kind``, ``itl_ms``, ``acceptance_length``, and whether their
    drafts explain it (``refused``: fewer tokens per step than the median in the same proportion)."""

    @property
    def sentence(self) -> str:
        """A description for terminals and reports."""
        explained = sum(bool(one["refused"]) for one in self.slowest)
        return (
            f"drafts and pace: {self.low[0]:.2f} tokens per step and {self.low[1]:.1f} ms per token in the third of "
            f"the answers with the fewest accepted drafts, {self.high[0]:.2f} and {self.high[1]:.1f} ms in the third "
            f"with the most (rank correlation {self.correlation:.2f}); refused drafts explain {explained} of the "
            f"{len(self.slowest)} slowest"
        )


@dataclass(frozen=True)
class RequestTables:
    """All tables of one server."""

    kinds: list[RequestGroup]
    turns: list[RequestGroup]
    sessions: SessionTimes | None
    acceptance: AcceptanceEffect | None
    late_ms: dict[str, float]
    """Sent after planned: ``p50``, ``p99``, ``max`` in milliseconds."""
    prefix_hit_rate: float | None
    """Share of prompt tokens that the server's prefix cache had; None without vLLM's counters."""

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """What a terminal shows of them."""
        found = []
        if self.sessions is not None:
            s = self.sessions
            found.append(
                f"{s.sessions} sessions of {s.turns:.1f} requests: {s.p50:.1f} s (p99 {s.p99:.1f} s), of which their "
                f"users waited {s.waiting:.2f} s for first tokens"
            )
        if self.prefix_hit_rate is not None:
            found.append(f"prefix cache: {self.prefix_hit_rate:.1%} of prompt tokens were hits")
        if self.acceptance is not None:
            found.append(self.acceptance.sentence)
        if self.late_ms:
            late = self.late_ms
            found.append(
                f"sent after planned: p50 {late['p50']:.1f} ms, p99 {late['p99']:.1f} ms, at most {late['max']:.1f} ms"
            )
        return found


def request_tables(
    requests: Sequence[RecordedRequest], metrics: MetricSeries, spans: Sequence[TimeSpan]
) -> RequestTables:
    """The tables of one server.

    Args:
        requests: of the server.
        metrics: its readings.
        spans: its segments, seconds of the run.

    """
    late = np.array([(r.sent - r.due) * 1e3 for r in requests if math.isfinite(r.sent)])
    talks = [r for r in requests if r.session is not None]
    return RequestTables(
        _groups(requests, lambda r: r.kind),
        _groups(talks, lambda r: f"{r.turn + 1}"),
        _session_times(talks),
        _acceptance_effect(requests),
        {"p50": _quantile(late, 0.5), "p99": _quantile(late, 0.99), "max": float(late.max())} if len(late) else {},
        _hit_rate(metrics, spans),
    )


def acceptance_length(request: RecordedRequest) -> float:
    """Tokens per step of a request; NaN where the server does not report accepted drafts."""
    steps = request.tokens - (request.accepted or 0)
    return request.tokens / steps if request.accepted is not None and steps > 0 else math.nan


def mean_itl(request: RecordedRequest) -> float:
    """Mean time between tokens in milliseconds; NaN with fewer than two arrivals."""
    if len(request.arrivals) < 2:
        return math.nan
    (began, first), (ended, last) = request.arrivals[0], request.arrivals[-1]
    return (ended - began) / (last - first) * 1e3


def _groups(requests: Sequence[RecordedRequest], key: Callable[[RecordedRequest], str]) -> list[RequestGroup]:
    found: dict[str, list[RecordedRequest]] = {}
    for request in requests:
        found.setdefault(key(request), []).append(request)
    names = sorted(found, key=lambda name: (len(name), name)) if all(name.isdigit() for name in found) else list(found)
    return [_group(name, found[name]) for name in names]


def _group(name: str, requests: Sequence[RecordedRequest]) -> RequestGroup:
    good = [r for r in requests if r.error is None and not r.left]
    first = np.array([r.ttft * 1e3 for r in good])
    whole = np.array([(r.ended - r.due) * 1e3 for r in good])
    pace = np.array([mean_itl(r) for r in good])
    steps = [(r.tokens, r.tokens - r.accepted) for r in good if r.accepted is not None]
    return RequestGroup(
        name,
        len(requests),
        sum(r.error is not None for r in requests),
        _quantile(first, 0.5),
        _quantile(first, 0.99),
        _quantile(np.array([r.answer_ttft * 1e3 for r in good]), 0.5),
        _mean(pace),
        _quantile(whole, 0.5),
        _quantile(whole, 0.99),
        _mean(np.array([float(r.prompt_tokens) for r in good if r.prompt_tokens is not None])),
        _mean(1e3 / pace[pace > 0]),
        sum(tokens for tokens, _ in steps) / sum(n for _, n in steps) if sum(n for _, n in steps) else math.nan,
    )


def _session_times(requests: Sequence[RecordedRequest]) -> SessionTimes | None:
    # Every segment has the sessions of the same numbers again where several servers take turns.
    by_session: dict[tuple[int | None, int | None], list[RecordedRequest]] = {}
    for request in requests:
        by_session.setdefault((request.segment, request.session), []).append(request)
    if not by_session:
        return None
    took = np.array([max(r.ended for r in one) - min(r.due for r in one) for one in by_session.values()])
    waited = [sum(r.ttft for r in one if r.arrivals) for one in by_session.values()]
    return SessionTimes(
        len(by_session),
        len(requests) / len(by_session),
        _quantile(took, 0.5),
        _quantile(took, 0.99),
        float(np.mean(waited)),
    )


def _acceptance_effect(requests: Sequence[RecordedRequest]) -> AcceptanceEffect | None:
    from scipy.stats import spearmanr

    known = [r for r in requests if r.error is None and math.isfinite(acceptance_length(r)) and mean_itl(r) > 0]
    if len(known) < MIN_JOINED or len({r.accepted for r in known}) < 2:
        return None
    lengths, pace = np.array([acceptance_length(r) for r in known]), np.array([mean_itl(r) for r in known])
    order = np.argsort(lengths)
    third = len(known) // 3
    low, high = order[:third], order[-third:]
    middle_length, middle_pace = float(np.median(lengths)), float(np.median(pace))
    slowest = [
        {
            "id": known[i].id,
            "kind": known[i].kind,
            "itl_ms": float(pace[i]),
            "acceptance_length": float(lengths[i]),
            # At least half of the slowdown (of its logarithm) is the smaller number of tokens per step.
            "refused": bool(
                math.log(middle_length / lengths[i]) >= 0.5 * math.log(max(pace[i] / middle_pace, 1.0 + 1e-9))
            ),
        }
        for i in np.argsort(-pace)[:SLOWEST]
    ]
    return AcceptanceEffect(
        len(known),
        float(spearmanr(lengths, pace).statistic),
        (float(lengths[low].mean()), float(pace[low].mean())),
        (float(lengths[high].mean()), float(pace[high].mean())),
        slowest,
    )


def _hit_rate(metrics: MetricSeries, spans: Sequence[TimeSpan]) -> float | None:
    if not metrics.has(m.PREFIX_QUERIES):
        return None
    found = metrics.ratio(m.PREFIX_HITS, m.PREFIX_QUERIES, spans)
    return found if math.isfinite(found) else None


def _quantile(values: np.ndarray, share: float) -> float:
    values = values[np.isfinite(values)]
    return float(np.quantile(values, share)) if len(values) else math.nan


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan
