"""The schedule of a scenario: every request with its due time, and which server gets which segment."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_instant.tools.measure.token_stream import STREAM_OPTIONS
from vllm_instant_loadtests import arrivals, prompts
from vllm_instant_loadtests.scenario import Scenario, ScenarioError, Traffic


@dataclass(frozen=True)
class ScheduledRequest:
    """One request of a scenario; all servers get the same ones."""

    number: int
    at: float
    """Second of the timeline at which it is due; a typist starts typing then."""
    kind: str
    route: str
    body: dict[str, Any]
    """The request body without ``model``. A typist's text is the content of the last message."""
    leave_after: int | None = None
    """Number of tokens after which the client hangs up."""
    characters_per_second: float | None = None
    """Typing speed of a typist."""

    @property
    def typing_seconds(self) -> float:
        """Duration of typing; latencies count from its end."""
        if self.characters_per_second is None:
            return 0.0
        return len(self.body["messages"][-1]["content"]) / self.characters_per_second

    def plain(self) -> dict[str, Any]:
        """The request as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Segment:
    """A part of the timeline for one server, or for all at the same time."""

    number: int
    servers: tuple[str, ...]
    begin: float
    end: float


def scheduled_requests(scenario: Scenario, seed: str, trace_speed: float = 1.0) -> list[ScheduledRequest]:
    """All requests in the order of their due times; raises ScenarioError where a file cannot be used."""
    found: list[tuple[float, Traffic, prompts.LoadPrompt, random.Random]] = []
    for traffic in scenario.traffic:
        choose = random.Random(f"{seed}/{traffic.kind}")
        times = _times(scenario, traffic, choose, trace_speed)
        for when, asked in zip(times, _asked(scenario, traffic, len(times), f"{seed}/{traffic.kind}"), strict=True):
            found.append((float(when), traffic, asked, choose))
    found.sort(key=lambda entry: entry[0])
    return [_due(number, *entry) for number, entry in enumerate(found)]


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


def _due(
    number: int, when: float, traffic: Traffic, asked: prompts.LoadPrompt, choose: random.Random
) -> ScheduledRequest:
    bounds = traffic.max_tokens if isinstance(traffic.max_tokens, tuple) else (traffic.max_tokens,) * 2
    leaves = choose.random() < traffic.leave_share
    leave_after = choose.randint(*traffic.leave_after_tokens)
    body: dict[str, Any] = {
        "temperature": traffic.temperature if asked.temperature is None else asked.temperature,
        "max_tokens": choose.randint(*bounds),
        "seed": choose.getrandbits(31),
        "stream": True,
        "stream_options": STREAM_OPTIONS,
        **({"ignore_eos": True} if traffic.ignore_eos else {}),
        **traffic.extra,
    }
    if traffic.route == "completions":
        before = "".join(f"{turn['content']}\n" for turn in asked.before)
        body["prompt"] = before + asked.text
    else:
        body["messages"] = [*asked.before, {"role": "user", "content": asked.text}]
    return ScheduledRequest(
        number,
        when,
        traffic.kind,
        traffic.route,
        body,
        leave_after if leaves else None,
        traffic.characters_per_second if traffic.route == "typist" else None,
    )
