"""The schedule of a scenario: every request with its due time, and which server gets which segment."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from vllm_instant.tools.measure.token_stream import STREAM_OPTIONS
from vllm_instant_loadtests import arrivals, prompts, sessions
from vllm_instant_loadtests.scenario import Scenario, ScenarioError, Traffic
from vllm_instant_loadtests.scheduled_request import ScheduledRequest
from vllm_instant_loadtests.traces import TraceError, TraceRequest, read_trace

MakeRequests = Callable[[float, int], list[ScheduledRequest]]
"""Makes the requests of a session, or a single one, that begins at a second and has a number."""


@dataclass(frozen=True)
class Segment:
    """A part of the timeline for one server, or for all at the same time."""

    number: int
    servers: tuple[str, ...]
    begin: float
    end: float


def scheduled_requests(scenario: Scenario, seed: str, trace_speed: float = 1.0) -> list[ScheduledRequest]:
    """All requests in the order of their due times, the turns of a session after its first request.

    Raises:
        ScenarioError: where a file cannot be used.

    """
    found: list[tuple[float, MakeRequests]] = []
    for traffic in scenario.traffic:
        choose = random.Random(f"{seed}/{traffic.kind}")
        recorded = _recorded(scenario, traffic, trace_speed)
        found += (
            _replayed(traffic, recorded, f"{seed}/{traffic.kind}", choose)
            if recorded is not None
            else _drawn(scenario, traffic, f"{seed}/{traffic.kind}", choose, trace_speed)
        )
    found.sort(key=lambda entry: entry[0])
    requests: list[ScheduledRequest] = []
    for when, make in found:
        requests += make(when, len(requests))
    return requests


def segments(scenario: Scenario, servers: Sequence[str], seed: str) -> list[Segment]:
    """The segments in order: in every round all servers get the same part of the timeline, in random order."""
    if len(servers) == 1 or scenario.alternation.together:
        return [Segment(0, tuple(servers), 0.0, scenario.seconds)]
    order = random.Random(f"{seed}/order")
    rounds = max(1, round(scenario.seconds / scenario.alternation.seconds))
    ends = [scenario.seconds * (number + 1) / rounds for number in range(rounds)]
    return [
        Segment(number, (server,), begin, end)
        for number, (begin, end) in enumerate(zip([0.0, *ends], ends, strict=False))
        for server in order.sample(list(servers), len(servers))
    ]


def trace_of(scenario: Scenario, traffic: Traffic) -> list[TraceRequest] | None:
    """The requests of a traffic's trace, where it has one with lengths; raises ScenarioError."""
    if traffic.trace is None:
        return None
    try:
        recorded = read_trace(scenario.folder / traffic.trace)
    except TraceError as error:
        raise ScenarioError(f"the trace of {traffic.kind!r} cannot be used: {error}") from None
    return recorded[: traffic.max_requests] if recorded is not None else None


def _recorded(scenario: Scenario, traffic: Traffic, speed: float) -> list[TraceRequest] | None:
    recorded = trace_of(scenario, traffic)
    if recorded is None:
        return None
    scaled = [replace(one, at=one.at / speed, pause=one.pause / speed) for one in recorded]
    # Requests come after the ones that they wait for, so that none loses one.
    return [one for one in scaled if one.at < scenario.seconds]


def _replayed(
    traffic: Traffic, recorded: list[TraceRequest], seed: str, choose: random.Random
) -> list[tuple[float, MakeRequests]]:
    groups: dict[str, list[int]] = {}
    for place, one in enumerate(recorded):
        groups.setdefault(one.session or f"alone {place}", []).append(place)
    make = partial(_body, traffic, choose)
    return [
        (recorded[places[0]].at, partial(sessions.replayed, traffic, recorded, places, make, seed))
        for places in groups.values()
    ]


def _drawn(
    scenario: Scenario, traffic: Traffic, seed: str, choose: random.Random, trace_speed: float
) -> list[tuple[float, MakeRequests]]:
    times = _times(scenario, traffic, choose, trace_speed)
    make = partial(_body, traffic, choose)
    if traffic.session is not None:
        turns = [round(sessions.drawn(traffic.session.turns, choose, whole=True)) for _ in times]
        asked = iter(_asked(scenario, traffic, sum(turns), seed))
        talks = [list(itertools.islice(asked, count)) for count in turns]
        return [
            (float(when), partial(sessions.conversation, traffic, talk, make, choose))
            for when, talk in zip(times, talks, strict=True)
        ]
    one_each = zip(times, _asked(scenario, traffic, len(times), seed), strict=True)
    if traffic.step:
        return [(float(when), partial(sessions.agent, traffic, task, make, choose)) for when, task in one_each]
    return [(float(when), partial(_alone, traffic, one, choose)) for when, one in one_each]


def _times(scenario: Scenario, traffic: Traffic, choose: random.Random, trace_speed: float) -> arrivals.Times:
    if traffic.trace is not None:
        try:
            return arrivals.traced(scenario.folder / traffic.trace, scenario.seconds, trace_speed)
        except (OSError, ValueError) as error:
            raise ScenarioError(f"the trace of {traffic.kind!r} cannot be used: {error}") from None
    generator = np.random.default_rng(choose.getrandbits(64))
    return arrivals.due(traffic.rate or 0.0, scenario.seconds, generator, traffic.arrivals, traffic.cv)


def _asked(scenario: Scenario, traffic: Traffic, count: int, seed: str) -> list[prompts.LoadPrompt]:
    if traffic.prompts in prompts.BUILT_IN:
        return prompts.of_class(traffic.prompts, count, seed, traffic.prompt_characters)
    file = scenario.folder / traffic.prompts
    if not file.exists():
        raise ScenarioError(
            f"the prompts of {traffic.kind!r} should be a file or one of {', '.join(prompts.BUILT_IN)}, "
            f"not {traffic.prompts!r}"
        )
    try:
        known = prompts.from_file(file)
    except ValueError as error:
        raise ScenarioError(f"the prompts of {traffic.kind!r} cannot be used: {error}") from None
    shuffled = random.Random(seed).sample(known, len(known))
    return [shuffled[i % len(shuffled)] for i in range(count)]


def _alone(
    traffic: Traffic, asked: prompts.LoadPrompt, choose: random.Random, when: float, number: int
) -> list[ScheduledRequest]:
    leaves = choose.random() < traffic.leave_share
    leave_after = choose.randint(*traffic.leave_after_tokens)
    body = _body(traffic, choose, asked)
    if traffic.route == "completions":
        before = "".join(f"{turn['content']}\n" for turn in asked.before)
        body["prompt"] = before + asked.text
    else:
        body["messages"] = [*asked.before, {"role": "user", "content": asked.text}]
    alone = ScheduledRequest(
        number,
        when,
        traffic.kind,
        traffic.route,
        body,
        leave_after if leaves else None,
        traffic.characters_per_second if traffic.route == "typist" else None,
    )
    return [alone]


def _body(traffic: Traffic, choose: random.Random, asked: prompts.LoadPrompt) -> dict[str, Any]:
    """The body of a request without its prompt."""
    bounds = traffic.max_tokens if isinstance(traffic.max_tokens, tuple) else (traffic.max_tokens,) * 2
    return {
        "temperature": traffic.temperature if asked.temperature is None else asked.temperature,
        "max_tokens": choose.randint(*bounds),
        "seed": choose.getrandbits(31),
        "stream": True,
        "stream_options": STREAM_OPTIONS,
        **({"ignore_eos": True} if traffic.ignore_eos else {}),
        **traffic.extra,
    }
