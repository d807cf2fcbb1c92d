"""Analyses a recorded run: percentiles, spikes and their causes, goals, comparisons of servers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vllm_instant_loadtests import causes, compare, goals, spikes, windows
from vllm_instant_loadtests.cause_finding import CauseFinding
from vllm_instant_loadtests.goals import GoalResult, LoadTestGoals
from vllm_instant_loadtests.metric_series import MetricSeries, TimeSpan
from vllm_instant_loadtests.request_tables import RequestTables, request_tables
from vllm_instant_loadtests.run_recorder import Disturbance, RecordedRequest, RecordedRun
from vllm_instant_loadtests.spike_context import SpikeContext
from vllm_instant_loadtests.spikes import MetricRise
from vllm_instant_loadtests.windows import ITL, STALL, TTFT, LatencySamples, WindowedSeries

E2E = "e2e"
MARGIN = 1.0
"""Seconds around a spike that do not belong to the baseline."""


@dataclass(frozen=True)
class Spike:
    """A time span in which a server was slower than its baseline, with causes."""

    server: str
    began: float
    ended: float
    rises: list[MetricRise]
    """By metric, the most significant first."""
    findings: list[CauseFinding]
    """Causes with scores, the likeliest first."""

    @property
    def metric(self) -> str:
        """The metric with the most significant rise."""
        return self.rises[0].metric

    @property
    def cause(self) -> str:
        """The likeliest cause, or "unknown"."""
        return self.findings[0].cause

    @property
    def evidence(self) -> list[str]:
        """The evidence for the cause."""
        return self.findings[0].evidence

    @property
    def alternatives(self) -> list[CauseFinding]:
        """Other causes with evidence."""
        return [finding for finding in self.findings[1:] if finding.score > 0]

    @property
    def sentence(self) -> str:
        """A description for terminals and reports."""
        rise = self.rises[0]
        return (
            f"{self.server}, {self.began:.1f} to {self.ended:.1f} s: {NAMES[rise.metric]} {rise.value * 1e3:.0f} ms, "
            f"{rise.ratio.mean:.2f} [{rise.ratio.low:.2f}, {rise.ratio.high:.2f}] times its baseline "
            f"({rise.baseline * 1e3:.0f} ms), p = {rise.p:.4f}: {self.cause}"
        )

    def plain(self) -> dict[str, Any]:
        """The spike as JSON types."""
        return {
            "server": self.server,
            "began": round(self.began, 2),
            "ended": round(self.ended, 2),
            "metric": self.metric,
            "cause": self.cause,
            "evidence": self.evidence,
            "alternatives": [asdict(finding) for finding in self.alternatives],
            "score": self.findings[0].score,
            "rises": [
                {
                    "metric": rise.metric,
                    "began": round(rise.began, 2),
                    "ended": round(rise.ended, 2),
                    "baseline_ms": rise.baseline * 1e3,
                    "value_ms": rise.value * 1e3,
                    "ratio": vars(rise.ratio),
                    "p": rise.p,
                }
                for rise in self.rises
            ],
        }


NAMES = {windows.ITL: "p99 ITL", windows.PACE: "mean ITL", windows.TTFT: "p99 TTFT", windows.STALL: "longest stall"}


@dataclass(frozen=True)
class ServerAnalysis:
    """The results of one server."""

    server: str
    seconds: float
    """Duration of its segments."""
    requests: int
    failed: int
    left: int
    """Number of clients that hung up on purpose."""
    tokens: int
    percentiles: dict[str, dict[str, float]]
    """``ttft``, ``itl``, ``stall``, ``e2e``: ``p50``, ``p95``, ``p99``, ``mean`` in milliseconds."""
    too_little: dict[str, str]
    """By metric, why it was not searched for spikes."""
    spikes: list[Spike]
    series: dict[str, WindowedSeries]
    """By metric; left out of the JSON."""
    quiet: list[TimeSpan]
    """The baseline: the parts of the run without spikes."""
    events: list[Disturbance] = field(default_factory=list)
    """Injected disturbances."""
    tables: RequestTables | None = None
    """By kind, turn, session and accepted drafts."""

    @property
    def thinks(self) -> bool:
        """Whether some answers begin after thinking tokens."""
        groups = self.tables.kinds if self.tables is not None else []
        return any(group.answer_p50 > group.ttft_p50 for group in groups)

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all streams per second."""
        return self.tokens / self.seconds if self.seconds > 0 else math.nan

    def reached(self) -> dict[str, float | None]:
        """The values that goals are compared with, by goal."""
        found: dict[str, float | None] = {
            f"{metric}_{share}_ms": value
            for metric, by_share in self.percentiles.items()
            for share, value in by_share.items()
        }
        found["error_rate"] = self.failed / self.requests if self.requests else None
        # With too little data to search, the number of spikes is unknown, not 0.
        found["spikes"] = None if len(self.too_little) == len(windows.METRICS) else float(len(self.spikes))
        found["tokens_per_second"] = self.tokens_per_second if self.seconds > 0 else None
        return found

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "server": self.server,
            "seconds": self.seconds,
            "requests": self.requests,
            "failed": self.failed,
            "left": self.left,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second if self.seconds > 0 else None,
            "milliseconds": self.percentiles,
            "too_little": self.too_little,
            "spikes": [spike.plain() for spike in self.spikes],
            "baseline": [[round(began, 2), round(ended, 2)] for began, ended in self.quiet],
            "events": [asdict(event) for event in self.events],
            "tables": self.tables.plain() if self.tables is not None else None,
        }


@dataclass(frozen=True)
class RunAnalysis:
    """The results of a run."""

    about: dict[str, Any]
    servers: list[ServerAnalysis]
    comparisons: list[compare.ServerComparison]
    goals: list[GoalResult]
    since: list[compare.ServerComparison] = field(default_factory=list)
    """Each server compared with itself in an earlier run."""

    @property
    def met(self) -> bool:
        """Whether every server reached every goal and none got worse; decides the exit code."""
        return all(checked.met for checked in self.goals) and not any(map(got_worse, self.since))

    @property
    def all_comparisons(self) -> list[compare.ServerComparison]:
        """Of servers, and of runs."""
        return [*self.comparisons, *self.since]

    @property
    def spikes(self) -> list[Spike]:
        """The spikes of all servers."""
        return [spike for server in self.servers for spike in server.spikes]

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "run": self.about,
            "met": self.met,
            "goals": [asdict(checked) for checked in self.goals],
            "servers": [server.plain() for server in self.servers],
            "comparisons": [comparison.plain() for comparison in self.all_comparisons],
        }

    def _trace_sentence(self) -> list[str]:
        share = self.about.get("trace_prefix_share")
        return [] if share is None else [f"the trace's prompts: {share:.1%} of their tokens have a prefix sent before"]

    def summary(self) -> str:
        """Text for a terminal: spikes with their evidence, verdicts and goals, one per line."""
        lines: list[str] = []
        for server in self.servers:
            for spike in server.spikes:
                lines += [spike.sentence, *(f"    {line}" for line in spike.evidence)]
            if not server.spikes:
                searched = [NAMES[metric] for metric in windows.METRICS if metric not in server.too_little]
                looked = f"no spike in {', '.join(searched)}" if searched else "not searched for spikes"
                lines.append(f"{server.server}: {looked}")
            lines += [f"    {NAMES[metric]} was not searched: {why}" for metric, why in server.too_little.items()]
            lines += [f"    {line}" for line in (server.tables.sentences() if server.tables is not None else ())]
        lines += self._trace_sentence()
        lines += [comparison.verdict for comparison in self.all_comparisons]
        lines += [f"{'met' if checked.met else 'MISSED'}: {checked.sentence}" for checked in self.goals]
        return "\n".join(lines)


def got_worse(comparison: compare.ServerComparison) -> bool:
    """Whether some metric of a server is worse than before, or requests fail that did not."""
    return any(row.verdict == "worse" for row in comparison.rows) or comparison.failed[0] > comparison.failed[1]


def analyse_run(
    run: RecordedRun, goals: LoadTestGoals | None = None, baseline: RecordedRun | None = None
) -> RunAnalysis:
    """Analyse a run.

    Args:
        run: the recording.
        goals: of the analysis; those of the scenario (``run.about["goals"]``) by default.
        baseline: an earlier run of the same scenario and seed, which every server is compared with.

    Raises:
        BaselineError: where the earlier run cannot be compared.

    """
    wanted = goals if goals is not None else LoadTestGoals(**run.about.get("goals", {}))
    names = [str(server["name"]) for server in run.about.get("servers", [])]
    names += sorted({request.server for request in run.requests} - set(names))
    servers = [analyse_server(run.of(name), name) for name in names]
    return RunAnalysis(
        run.about,
        servers,
        # The later server compared with the earlier one: scenarios name the baseline first.
        [compare.compare_servers(run, ours, theirs) for theirs, ours in itertools.combinations(names, 2)],
        [checked for server in servers for checked in _checked(wanted, server)],
        compare.compare_runs(run, baseline) if baseline is not None else [],
    )


def analyse_server(run: RecordedRun, name: str) -> ServerAnalysis:
    """Analyse the part of a run that concerns one server (``RecordedRun.of``)."""
    requests = sorted(run.requests, key=lambda request: request.due)
    parts = windows.loaded_segments(run.about.get("segments", []), name, requests)
    measured = windows.latency_samples(requests)
    series = {metric: windows.windowed_series(metric, measured[metric], parts) for metric in windows.METRICS}
    searched = [one for one in series.values() if not one.too_little]
    found = {one.metric: spikes.metric_rises(one, measured[one.metric], len(searched)) for one in searched}
    groups = spikes.merge_rises(found)
    spans = [(min(r.began for r in group), max(r.ended for r in group)) for group in groups]
    quiet = _without(parts, spans)
    metrics = MetricSeries(run.samples)
    made = []
    for group, (began, ended) in zip(groups, spans, strict=True):
        context = SpikeContext(run, metrics, measured, group, quiet)
        made.append(Spike(name, began, ended, group, causes.attribute(context)))
    return ServerAnalysis(
        server=name,
        seconds=sum(ended - began for began, ended in parts),
        requests=len(requests),
        failed=sum(request.error is not None for request in requests),
        left=sum(request.left for request in requests),
        tokens=sum(request.tokens for request in requests),
        percentiles=_percentiles(requests, measured),
        too_little={one.metric: one.too_little for one in series.values() if one.too_little},
        spikes=made,
        series=series,
        quiet=quiet,
        events=run.events,
        tables=request_tables(requests, metrics, parts),
    )


def _checked(wanted: LoadTestGoals, server: ServerAnalysis) -> list[GoalResult]:
    return list(goals.check_goals(wanted, server.server, server.reached()))


def _without(parts: Sequence[TimeSpan], taken: Sequence[TimeSpan]) -> list[TimeSpan]:
    """The parts of the run that are at least ``MARGIN`` away from every spike."""
    left = [(began + windows.WARM_UP, ended) for began, ended in parts]
    for low, high in taken:
        cut = [((began, min(ended, low - MARGIN)), (max(began, high + MARGIN), ended)) for began, ended in left]
        left = [(began, ended) for pair in cut for began, ended in pair]
    return [(began, ended) for began, ended in left if ended > began]


def _percentiles(
    requests: Sequence[RecordedRequest], measured: dict[str, LatencySamples]
) -> dict[str, dict[str, float]]:
    whole = np.array([r.ended - r.due for r in requests if not r.left and r.error is None])
    longest = [max((b[0] - a[0] for a, b in itertools.pairwise(r.arrivals)), default=math.nan) for r in requests]
    stalls = np.array([value for value in longest if math.isfinite(value)])
    ones = {E2E: whole, STALL: stalls}
    everything = {
        TTFT: measured[TTFT],
        ITL: measured[ITL],
        **{name: LatencySamples.plain(values) for name, values in ones.items()},
    }
    return {
        name: {f"p{share}": entries.quantile(share / 100) * 1e3 for share in (50, 95, 99)}
        | {"mean": entries.mean() * 1e3}
        for name, entries in everything.items()
        if len(entries.values)
    }
