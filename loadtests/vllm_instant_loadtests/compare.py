"""Compares two servers of a run: the same requests in pairs, with intervals and a verdict for each metric.

Every server got the same prompts in segments of the same number, so rounds are compared in pairs and drift of the
machine cancels. The verdicts are those of ``vllm_instant.tools.measure.significance``: better, worse, same, undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vllm_instant.tools.measure.significance import MARGIN, Contrast, Direction, paired_contrast, resample_rounds
from vllm_instant.tools.measure.statistics import Estimate
from vllm_instant_loadtests.run_recorder import RecordedRequest, RecordedRun

MIN_ROUNDS = 4
BLOCKS = 8
"""Number of blocks of neighbouring requests that stand for rounds where there are fewer segments than that."""
MIN_FOR_P99 = 100


@dataclass(frozen=True)
class ComparedMetric:
    """One metric of two servers."""

    name: str
    unit: str
    ours: float | None
    theirs: float | None
    contrast: Contrast | None
    unsupported_reason: str = ""
    """Why there is no contrast."""

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``same``, ``undecided`` or ``not measured``, of the first server."""
        return self.contrast.verdict if self.contrast else "not measured"

    @property
    def rounds_to_decide(self) -> int | None:
        """About how many further rounds would decide an undecided metric; None where rounds cannot."""
        return self.contrast.rounds_to_decide() if self.contrast else None

    @property
    def effect(self) -> Estimate | None:
        """The first server's value divided by the second one's, with its 95 % interval."""
        return self.contrast.effect if self.contrast else None


@dataclass(frozen=True)
class ServerComparison:
    """One server compared with another."""

    ours: str
    theirs: str
    pairs: int
    """Number of requests that both servers answered."""
    rounds: int
    rows: list[ComparedMetric]
    failed: tuple[int, int]
    """Number of requests that failed on one server only: the first, the second."""

    @property
    def verdict(self) -> str:
        """In one sentence."""
        name = f"{self.ours} compared with {self.theirs}"
        if not any(row.contrast for row in self.rows):
            return f"{name}: too little data"
        kinds = ("better", "worse", "same", "undecided")
        counted = ", ".join(f"{sum(row.verdict == kind for row in self.rows)} {kind}" for kind in kinds)
        return f"{name}: {counted}{self._advice()}"

    def _advice(self) -> str:
        needed = [row.rounds_to_decide for row in self.rows if row.rounds_to_decide is not None]
        if not needed:
            return ""
        longer = 1 + max(needed) / self.rounds
        return f" (about {max(needed)} more rounds would decide what rounds can: a run {longer:.1f} times as long)"

    def plain(self) -> dict[str, Any]:
        """The comparison as JSON types."""
        rows = [
            {
                "name": row.name,
                "unit": row.unit,
                self.ours: row.ours,
                self.theirs: row.theirs,
                "verdict": row.verdict,
                "rounds_to_decide": row.rounds_to_decide,
                "unsupported_reason": row.unsupported_reason,
                **({"effect": vars(row.effect)} if row.effect else {}),
            }
            for row in self.rows
        ]
        return {
            "ours": self.ours,
            "theirs": self.theirs,
            "pairs": self.pairs,
            "rounds": self.rounds,
            "failed_only_here": list(self.failed),
            "verdict": self.verdict,
            "rows": rows,
        }


Samples = Callable[[RecordedRequest], list[float]]


def _first(request: RecordedRequest) -> list[float]:
    return [request.ttft * 1e3] if request.arrivals else []


def _between(request: RecordedRequest) -> list[float]:
    times, totals = np.array(request.arrivals).T
    tokens = np.maximum(np.diff(totals), 1).astype(int)
    return list(np.repeat(np.diff(times) / tokens, tokens) * 1e3)


def _whole(request: RecordedRequest) -> list[float]:
    return [(request.ended - request.due) * 1e3]


def _stall(request: RecordedRequest) -> list[float]:
    times = np.array(request.arrivals)[:, 0]
    return [float(np.diff(times).max()) * 1e3] if len(times) > 1 else []


_ROWS: tuple[tuple[str, Samples, float | None], ...] = (
    ("TTFT p50", _first, 0.5),
    ("TTFT p99", _first, 0.99),
    ("ITL mean", _between, None),
    ("ITL p50", _between, 0.5),
    ("ITL p99", _between, 0.99),
    ("longest stall p50", _stall, 0.5),
    ("longest stall p99", _stall, 0.99),
    ("E2E p50", _whole, 0.5),
    ("E2E p99", _whole, 0.99),
)


def compare_servers(run: RecordedRun, ours: str, theirs: str) -> ServerComparison:
    """One server compared with another; lower is better for every metric."""
    first, second = _numbered(run, ours), _numbered(run, theirs)
    both = sorted(first.keys() & second.keys())
    good = [n for n in both if _complete(first[n]) and _complete(second[n])]
    failed = (
        sum(not _good(first[n]) and _good(second[n]) for n in both),
        sum(_good(first[n]) and not _good(second[n]) for n in both),
    )
    rounds = _rounds([first[n] for n in good])
    rows = [
        _row(
            name,
            samples,
            share,
            [[first[good[i]] for i in r] for r in rounds],
            [[second[good[i]] for i in r] for r in rounds],
        )
        for name, samples, share in _ROWS
    ]
    return ServerComparison(ours, theirs, len(good), len(rounds), rows, failed)


class BaselineError(ValueError):
    """Two runs cannot be compared; the message is one sentence."""


def compare_runs(now: RecordedRun, before: RecordedRun) -> list[ServerComparison]:
    """Each server compared with the one of its name in an earlier run, request by request.

    Raises:
        BaselineError: where the runs have other scenarios or seeds, whose requests are not the same, or no server of
            the same name.

    """
    for what in ("scenario", "seed"):
        this, that = now.about.get(what), before.about.get(what)
        if this != that:
            shown = [one.get("name") if isinstance(one, dict) else one for one in (this, that)]
            different = f"{what} {shown[1]!r}, not {shown[0]!r}" if shown[0] != shown[1] else f"another {what}"
            raise BaselineError(f"the run of --baseline has {different}: its requests are not the same")
    names = [str(server["name"]) for server in now.about.get("servers", [])]
    known = {request.server for request in before.requests}
    if not known.intersection(names):
        raise BaselineError(f"the run of --baseline has no server called {' or '.join(names)}")
    both = RecordedRun(now.about, [*now.requests, *(replace(r, server=f"{r.server} before") for r in before.requests)])
    return [compare_servers(both, name, f"{name} before") for name in names if name in known]


def _row(
    name: str,
    samples: Samples,
    share: float | None,
    ours: Sequence[list[RecordedRequest]],
    theirs: Sequence[list[RecordedRequest]],
) -> ComparedMetric:
    arms = []
    for arm in (ours, theirs):
        by_round = [np.array([value for request in one for value in samples(request)]) for one in arm]
        arms.append(by_round)
    kept = [i for i in range(len(ours)) if len(arms[0][i]) and len(arms[1][i])]
    if len(kept) < MIN_ROUNDS:
        return ComparedMetric(name, "ms", None, None, None, f"{len(kept)} rounds of both, {MIN_ROUNDS} are needed")
    count = min(sum(len(arm[i]) for i in kept) for arm in arms)
    if share == 0.99 and count < MIN_FOR_P99:
        return ComparedMetric(name, "ms", None, None, None, f"{count} values, a p99 needs {MIN_FOR_P99}")

    def statistic(values: np.ndarray) -> float:
        return float(values.mean() if share is None else np.quantile(values, share))

    first, second = (resample_rounds([arm[i] for i in kept], statistic) for arm in arms)
    better: Direction = "lower"
    contrast = paired_contrast(first, second, better=better, margin=MARGIN, comparisons=len(_ROWS))
    return ComparedMetric(name, "ms", first.value, second.value, contrast, "" if contrast else "a value is zero")


def _numbered(run: RecordedRun, server: str) -> dict[int, RecordedRequest]:
    return {r.number: r for r in run.requests if r.server == server and r.number is not None}


def _good(request: RecordedRequest) -> bool:
    return request.error is None


def _complete(request: RecordedRequest) -> bool:
    """Whether the answer ended by itself after at least two arrivals, so that all metrics exist."""
    return request.error is None and not request.left and len(request.arrivals) > 1


def _rounds(requests: Sequence[RecordedRequest]) -> list[list[int]]:
    """Indices by segment; with too few segments, by blocks of neighbouring requests."""
    by_segment: dict[int | None, list[int]] = {}
    for i, request in enumerate(requests):
        by_segment.setdefault(request.segment, []).append(i)
    if len(by_segment) >= MIN_ROUNDS:
        return list(by_segment.values())
    return [list(part) for part in np.array_split(np.arange(len(requests)), BLOCKS) if len(part)]
