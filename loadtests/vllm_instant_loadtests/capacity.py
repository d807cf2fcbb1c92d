"""A capacity search over one or several servers: its plan, the order of its probes, and what a recorded one shows.

In every round each server gets one probe, in random order, at the rate that its own search asks for: the drift of the
machine is in all of them. Probes of one round have the same prompts as far as they have as many requests.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vllm_instant.tools.measure.significance import Contrast
from vllm_instant.tools.measure.statistics import Estimate
from vllm_instant_loadtests.capacity_goals import (
    ATTAIN,
    DEFAULT_ATTAIN,
    GoalError,
    ProbeResult,
    ShareGoal,
    count_probe,
    parse_goals,
)
from vllm_instant_loadtests.capacity_search import CapacitySearch, SearchLimits, compare_capacity
from vllm_instant_loadtests.run_recorder import RecordedRun
from vllm_instant_loadtests.scenario import Scenario, ScenarioError

WARM_UP_SHARE = 0.25
"""Part of a probe, in addition to its seconds, in which the load builds up; its requests do not count."""
MIN_REQUESTS = 20
MAX_LENGTHENING = 3.0
"""Probes at low rates last longer, up to this factor, so that ``MIN_REQUESTS`` count: fewer show next to nothing."""
USERS_NEAR = 0.3
"""Probes within this difference of logarithms of the capacity tell how many requests are in progress there."""


@dataclass(frozen=True)
class CapacityPlan:
    """What is searched, and when the search ends; JSON types only."""

    goals: list[str]
    attain: float = DEFAULT_ATTAIN
    precision: float = 0.10
    probe_seconds: float = 20.0
    max_probes: int = 40
    """Per server."""
    rates: list[float] = field(default_factory=list)
    """Instead of a search: a plain sweep over these rates."""

    def __post_init__(self) -> None:
        parse_goals(self.goals, self.attain)
        if not self.precision > 0 or not self.probe_seconds > 0 or any(not rate > 0 for rate in self.rates):
            raise GoalError("--precision, --probe-seconds and --sweep should be above 0")

    @property
    def share_goals(self) -> list[ShareGoal]:
        """The goals with the one on all limits at once."""
        return parse_goals(self.goals, self.attain)

    def seconds_at(self, rate: float) -> float:
        """Seconds of a probe at a rate that count."""
        return min(max(self.probe_seconds, MIN_REQUESTS / rate), MAX_LENGTHENING * self.probe_seconds)

    @property
    def limits(self) -> SearchLimits:
        """When the search on a server ends."""
        return SearchLimits(self.precision, self.max_probes)

    def text(self) -> str:
        """As one word of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> CapacityPlan:
        """The plan that ``text`` wrote; raises GoalError."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise GoalError(f"the plan of a capacity search cannot be read: {error}") from None


RunProbe = Callable[[str, float, int], ProbeResult | None]
"""Of a server, a rate and the number of the round; None where the run was stopped."""


def search_capacity(
    plan: CapacityPlan,
    searches: Mapping[str, CapacitySearch],
    run_probe: RunProbe,
    *,
    seed: str,
    out_of_time: Callable[[], bool] = lambda: False,
) -> bool:
    """Probe all servers in rounds until every search has ended; returns whether they all did.

    Args:
        plan: goals and limits.
        searches: by server; probes of an interrupted run are in them already, and count.
        run_probe: makes one probe.
        seed: of the order of the servers.
        out_of_time: asked before each round.

    """
    done = min((len(search.probes) for search in searches.values()), default=0)
    while not _finished(plan, searches):
        if out_of_time():
            return False
        order = random.Random(f"{seed}/order/{done}").sample(list(searches), len(searches))
        for server in order:
            search = searches[server]
            if len(search.probes) > done:
                continue  # an interrupted round
            rate = plan.rates[done % len(plan.rates)] if plan.rates else search.next_rate()
            probe = run_probe(server, rate, done)
            if probe is None:
                return False
            search.observe(probe)
        done += 1
    return True


def _finished(plan: CapacityPlan, searches: Mapping[str, CapacitySearch]) -> bool:
    if plan.rates:
        return all(len(search.probes) >= len(plan.rates) for search in searches.values())
    return all(search.finished for search in searches.values())


def offered_rate(scenario: Scenario) -> float:
    """Mean number of requests (or sessions) per second of a scenario; raises ScenarioError for one with a trace."""
    total = 0.0
    for traffic in scenario.traffic:
        if traffic.rate is None:
            raise ScenarioError(
                f"{traffic.kind!r} of {scenario.name} has the arrival times of a trace: a capacity search needs a rate"
            )
        if isinstance(traffic.rate, list):
            points = [(0.0, traffic.rate[0][1]), *traffic.rate, (scenario.seconds, traffic.rate[-1][1])]
            when, height = np.array(points).T
            total += float(np.trapezoid(height, when) / scenario.seconds)
        else:
            total += traffic.rate
    return total


@dataclass(frozen=True)
class ServerCapacity:
    """The capacity of one server."""

    server: str
    rate: Estimate
    """Requests (or sessions) per second, with the 95 % interval."""
    users: Estimate
    """Mean number of requests (or sessions) in progress at that rate; the interval is that of the rate."""
    goodput: float
    """Requests per second within all limits, expected at that rate."""
    deciding_goal: str
    """The goal that is missed first when the rate rises."""
    finished: bool
    """Whether the interval is as narrow as was asked for."""
    bounded: bool
    """Whether the goals held at some rate and were missed at another."""
    probes: list[ProbeResult]
    curve: dict[str, Any]
    """``rate``, and the expected share within each goal."""
    targets: dict[str, float] = field(default_factory=dict)
    """The share that each goal asks for."""
    unit: str = "requests"
    """What the rate counts: requests, or sessions."""

    @property
    def sentence(self) -> str:
        """A description for terminals and reports."""
        if not self.bounded:
            held = [probe.rate for probe in self.probes if self._held(probe)]
            return f"{self.server}: no capacity found in {len(self.probes)} probes" + (
                f"; the goals held up to {max(held):.3g} per second" if held else "; the goals held at no rate"
            )
        unfinished = "" if self.finished else " (the interval is wider than asked for: run the same command again)"
        return (
            f"{self.server} carries {self.rate:.3g} {self.unit} per second, {self.users:.3g} at a time; "
            f"{self.deciding_goal} is missed first; {len(self.probes)} probes{unfinished}"
        )

    def _held(self, probe: ProbeResult) -> bool:
        shares = {name: good / total for name, (good, total) in probe.counts.items()}
        return bool(shares) and all(shares[name] >= target for name, target in self.targets.items() if name in shares)

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "probes": [probe.plain() for probe in self.probes]}


@dataclass(frozen=True)
class CapacityAnalysis:
    """What a recorded capacity search shows."""

    about: dict[str, Any]
    plan: CapacityPlan
    servers: list[ServerCapacity]
    comparisons: dict[tuple[str, str], Contrast]
    """By (ours, theirs)."""

    @property
    def met(self) -> bool:
        """Whether every server's capacity was found; a search's with the precision that was asked for."""
        return all(server.bounded and (server.finished or bool(self.plan.rates)) for server in self.servers)

    def verdict(self, ours: str, theirs: str) -> str:
        """One server compared with another, in one sentence."""
        contrast = self.comparisons[ours, theirs]
        effect = contrast.effect
        said = f"{ours} carries {effect.mean:.2f}× [{effect.low:.2f}, {effect.high:.2f}] of {theirs}"
        return f"{said}: {contrast.verdict}"

    def summary(self) -> str:
        """Text for a terminal."""
        sentences = [server.sentence for server in self.servers]
        return "\n".join(sentences + [self.verdict(*pair) for pair in self.comparisons])

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "run": self.about,
            "plan": asdict(self.plan),
            "servers": [server.plain() for server in self.servers],
            "comparisons": [
                {"ours": ours, "theirs": theirs, "sentence": self.verdict(ours, theirs), **contrast.plain()}
                for (ours, theirs), contrast in self.comparisons.items()
            ],
        }


def searches_of(run: RecordedRun, plan: CapacityPlan, start: float) -> dict[str, CapacitySearch]:
    """The searches of a recorded run with all its probes, by server; without any for a run that has not begun."""
    found = {
        str(server["name"]): CapacitySearch(plan.share_goals, start, plan.limits)
        for server in run.about.get("servers", [])
    }
    by_probe: dict[tuple[str, int | None], list[Any]] = {}
    for request in run.requests:
        by_probe.setdefault((request.server, request.segment), []).append(request)
    for segment in run.about.get("segments", []):
        server = str(segment["server"])
        found[server].observe(
            count_probe(
                plan.share_goals,
                by_probe.get((server, segment["number"]), []),
                server=server,
                rate=float(segment["rate"]),
                span=(float(segment["measured"][0]), float(segment["measured"][1])),
                stopped=bool(segment["stopped"]),
            )
        )
    return found


def analyse_capacity(run: RecordedRun) -> CapacityAnalysis:
    """Analyse a recorded capacity search; ``run.about`` has ``capacity`` (the plan) and ``start_rate``."""
    plan = CapacityPlan(**run.about["capacity"])
    searches = searches_of(run, plan, float(run.about["start_rate"]))
    known = {name: search for name, search in searches.items() if search.probes}
    unit = "sessions" if any(request.session is not None for request in run.requests) else "requests"
    servers = [_server(name, search, unit) for name, search in known.items()]
    comparable = {server.server: known[server.server] for server in servers if server.bounded}
    return CapacityAnalysis(run.about, plan, servers, compare_capacity(comparable))


def _server(name: str, search: CapacitySearch, unit: str = "requests") -> ServerCapacity:
    rate = search.estimate()
    rates = np.geomspace(*_plotted(search.probes), 60)
    shares = search.curve(np.append(rates, rate.mean))
    users = _users(search.probes, rate.mean)
    return ServerCapacity(
        name,
        rate,
        Estimate(users, users * rate.low / rate.mean, users * rate.high / rate.mean),
        rate.mean * float(shares[ATTAIN][-1]),
        search.deciding_goal(),
        search.finished,
        search.bounded,
        search.probes,
        {"rate": rates.tolist(), **{goal: share[:-1].tolist() for goal, share in shares.items()}},
        {goal.name: goal.target for goal in search.goals},
        unit,
    )


def _plotted(probes: Sequence[ProbeResult]) -> tuple[float, float]:
    rates = [probe.rate for probe in probes]
    return min(rates) * 0.9, max(rates) * 1.1


def _users(probes: Sequence[ProbeResult], rate: float) -> float:
    """Mean number in progress at a rate: the rate times the mean time in the system (Little 1961) of probes near it."""
    known = [p for p in probes if p.in_progress > 0 and not p.stopped and p.requests]
    near = [p for p in known if abs(math.log(p.rate / rate)) <= USERS_NEAR] or known
    return rate * float(np.median([p.in_progress / p.rate for p in near])) if near else math.nan
