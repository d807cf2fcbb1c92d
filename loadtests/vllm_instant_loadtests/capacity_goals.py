"""Goals of a capacity search, and how the requests of one probe are counted against them.

A goal such as ``ttft_p95_ms=500`` is a share: at least 95 % of the first tokens within 500 ms. Shares are counted, and
counts of several probes can be added, which percentiles cannot.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_instant_loadtests.run_recorder import RecordedRequest

METRICS = ("ttft", "answer", "itl", "e2e", "stall")
"""``answer`` is the time to the first token after the thinking ones."""
ATTAIN = "attain"
DEFAULT_ATTAIN = 0.95
STOP_FACTOR = 3.0
"""A probe ends early when more requests missed their limits than this many times what its goals allow in all of it."""
STOP_MARGIN = 5
_GOAL = re.compile(r"(ttft|answer|itl|e2e|stall)_p(\d{1,2}(?:\.\d+)?)_ms=(\d+(?:\.\d+)?)")


class GoalError(ValueError):
    """A goal cannot be read; the message is one sentence."""


@dataclass(frozen=True)
class ShareGoal:
    """At least ``target`` of the values of ``metric`` are within ``limit`` seconds.

    ``attain``, without a limit of its own, counts requests that are within the limits of all other goals at once, where
    the time between tokens counts on average over the tokens of a request, as in the goodput of ``vllm-instant bench``.
    """

    name: str
    metric: str
    target: float
    limit: float = float("nan")


@dataclass(frozen=True)
class ProbeResult:
    """What one server did at one rate."""

    server: str
    rate: float
    """Requests (or sessions) per second that were planned."""
    seconds: float
    """Length of the part whose requests count."""
    requests: int
    """Number of requests that count."""
    counts: dict[str, tuple[float, float]]
    """By goal: the number of requests within it, and their number. Shares of tokens are shares of as many requests:
    neighbouring tokens share their step, so that they are no independent trials."""
    goodput: float
    """Requests per second within all limits at once."""
    in_progress: float
    """Mean number of requests, or of sessions with their pauses, in progress."""
    stopped: bool = False
    """Whether it was ended early because the rate was clearly too high."""

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def parse_goals(texts: Sequence[str], attain: float = DEFAULT_ATTAIN) -> list[ShareGoal]:
    """The goals of a command line, ``METRIC_pPERCENT_ms=LIMIT``, and the share of requests within all limits.

    Raises:
        GoalError: in one sentence, for a goal that is none, is given twice, or for a share outside of (0, 1).

    """
    goals: list[ShareGoal] = []
    for text in texts:
        found = _GOAL.fullmatch(text.strip())
        if found is None or not 0 < float(found[2]) < 100 or not float(found[3]) > 0:
            raise GoalError(
                f"--goal {text} should be METRIC_pPERCENT_ms=MILLISECONDS with one of {', '.join(METRICS)}, "
                "for example ttft_p95_ms=500"
            )
        name = text.strip().split("=")[0]
        if name in [goal.name for goal in goals]:
            raise GoalError(f"--goal {name} is given twice")
        goals.append(ShareGoal(name, found[1], float(found[2]) / 100, float(found[3]) / 1e3))
    if not goals:
        raise GoalError("give at least one --goal, for example --goal ttft_p95_ms=500")
    if not 0 < attain < 1:
        raise GoalError(f"--attain {attain:g} should be a share between 0 and 1, for example 0.95")
    return [*goals, ShareGoal(ATTAIN, ATTAIN, attain)]


def count_probe(
    goals: Sequence[ShareGoal],
    requests: Sequence[RecordedRequest],
    *,
    server: str,
    rate: float,
    span: tuple[float, float],
    stopped: bool = False,
) -> ProbeResult:
    """Count the requests of a probe.

    Args:
        goals: what they should be within.
        requests: of one server and one segment.
        server: its name.
        rate: that was planned.
        span: seconds of the run; requests that were due in it count. The time before it lets the load build up.
        stopped: whether it was ended early.

    """
    known = [r for r in requests if span[0] <= r.due < span[1] and not _unknown(r, goals)]
    counts: dict[str, tuple[float, float]] = {}
    for goal in goals:
        good, total = _share(goal, goals, known)
        if total:
            counts[goal.name] = (good / total * len(known), float(len(known)))
    seconds = max(span[1] - span[0], 1e-9)
    return ProbeResult(
        server,
        rate,
        round(seconds, 4),
        len(known),
        counts,
        round(sum(within_limits(r, goals) for r in known) / seconds, 5),
        round(_in_progress(requests, span), 4),
        stopped,
    )


def within_limits(request: RecordedRequest, goals: Sequence[ShareGoal]) -> bool:
    """Whether a request is within the limits of all goals; one that failed is not."""
    return request.error is None and all(
        _value(request, goal.metric) <= goal.limit for goal in goals if goal.metric != ATTAIN
    )


def clearly_too_fast(
    goals: Sequence[ShareGoal], requests: Sequence[RecordedRequest], planned: float, waiting: int = 0
) -> bool:
    """Whether a probe can be ended early: several times more requests missed than its goals allow in the whole of it.

    A looser rule would end probes near the capacity when a burst of slow requests happens to come first.

    Args:
        goals: the strictest one on requests decides.
        requests: that have ended so far.
        planned: number of requests of the whole probe.
        waiting: number of requests whose first token is already later than its limit.

    """
    allowed = max(1 - goal.target for goal in goals if goal.metric != "itl") * planned
    missed = sum(not within_limits(r, goals) for r in requests if not r.left)
    return missed + waiting > STOP_FACTOR * allowed + STOP_MARGIN


def first_token_limit(goals: Sequence[ShareGoal]) -> float:
    """Seconds within which first tokens should arrive; infinite without such a goal."""
    return min((goal.limit for goal in goals if goal.metric == "ttft"), default=float("inf"))


def _unknown(request: RecordedRequest, goals: Sequence[ShareGoal]) -> bool:
    """Whether the client hung up before a request had missed any limit."""
    if not request.left:
        return False
    so_far = {"e2e": request.ended - request.due}
    if not request.arrivals:
        so_far |= dict.fromkeys(("ttft", "answer", "itl", "stall"), 0.0) | {"ttft": request.ended - request.due}
    return all(
        so_far.get(goal.metric, _value(request, goal.metric)) <= goal.limit for goal in goals if goal.metric != ATTAIN
    )


def _share(goal: ShareGoal, goals: Sequence[ShareGoal], requests: Sequence[RecordedRequest]) -> tuple[float, float]:
    if goal.metric == ATTAIN:
        return float(sum(within_limits(r, goals) for r in requests)), float(len(requests))
    if goal.metric != "itl":
        return float(sum(_value(r, goal.metric) <= goal.limit for r in requests)), float(len(requests))
    good = total = 0.0
    for request in requests:
        times, tokens = _between(request)
        good, total = good + float(tokens[times <= goal.limit].sum()), total + float(tokens.sum())
    return good, total


def _value(request: RecordedRequest, metric: str) -> float:
    """A request's own value of a metric, seconds; infinite where it failed before it had one."""
    if metric == "e2e":
        return request.ended - request.due if request.error is None else float("inf")
    if not request.arrivals:
        return float("inf")
    if metric == "ttft":
        return request.ttft
    if metric == "answer":
        return request.answer_ttft
    times, tokens = _between(request)
    if not len(times):
        return 0.0
    if metric == "stall":
        return float((times * tokens).max())
    return float((times * tokens).sum() / tokens.sum())


def _between(request: RecordedRequest) -> tuple[np.ndarray, np.ndarray]:
    """Time per token of each arrival after the first, and its number of tokens, ``[arrivals - 1]``."""
    if len(request.arrivals) < 2:
        return np.empty(0), np.empty(0)
    when, so_far = np.array(request.arrivals, float).T
    tokens = np.diff(so_far)
    return np.diff(when) / tokens, tokens


def _in_progress(requests: Sequence[RecordedRequest], span: tuple[float, float]) -> float:
    """Mean number of requests in progress; of sessions, from their first request to the end of their last."""
    spans: dict[Any, tuple[float, float]] = {}
    for number, request in enumerate(requests):
        key = ("session", request.session) if request.session is not None else number
        began, ended = spans.get(key, (request.due, request.ended))
        spans[key] = (min(began, request.due), max(ended, request.ended))
    inside = sum(max(0.0, min(ended, span[1]) - max(began, span[0])) for began, ended in spans.values())
    return inside / max(span[1] - span[0], 1e-9)
