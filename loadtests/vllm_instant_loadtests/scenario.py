"""A load test as a TOML file: traffic, servers and goals."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_instant_loadtests.goals import LoadTestGoals
from vllm_instant_loadtests.traces import MOONCAKE_BLOCK

Rate = float | list[tuple[float, float]]
_SERVER = re.compile(r"(?:^|\s)(?:([^\s=/]+)=)?(https?://[^\s/]\S*)")
Positive = Annotated[float, Field(gt=0)]
Bounds = float | tuple[float, float]
"""A value, or two bounds between which it is drawn uniformly."""


class ScenarioError(ValueError):
    """A scenario cannot be used; the message is one sentence: where, what was found, what would be valid."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SessionShape(_Table):
    """A conversation: turns with pauses, each with all earlier messages and answers."""

    turns: Annotated[int, Field(gt=0)] | tuple[int, int] = (2, 6)
    """Number of turns, or the bounds between which it is drawn."""
    think_seconds: Bounds = (1.0, 5.0)
    """Seconds between an answer and the next message, or their bounds."""


class Step(_Table):
    """One request of an agent."""

    name: str
    after: list[str] = []
    """Steps whose answers it waits for; without any of them it does not take place either."""
    chance: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Probability that it takes place: branches."""
    parallel: Annotated[int, Field(gt=0)] | tuple[int, int] = 1
    """Number of such requests at the same time, or its bounds."""
    pause_seconds: Bounds = 0.0
    """Time that the tool takes between the call and its result, or its bounds."""
    result_characters: Annotated[int, Field(ge=0)] | tuple[int, int] = 0
    """Length of the tool's result, which this step's prompt ends with, or its bounds."""
    text: str = ""
    """Further message of the user."""
    max_tokens: Annotated[int, Field(gt=0)] | tuple[int, int] | None = None
    """Instead of the traffic's."""


class Traffic(_Table):
    """One kind of request and its arrivals."""

    kind: str
    """Its name in the results."""
    prompts: str = ""
    """A built-in class of prompts (``prompts.BUILT_IN``), or a file relative to the scenario's folder; not for a trace
    with lengths."""
    rate: Rate | None = None
    """Requests (or sessions) per second, or points ``[second, rate]`` with linear interpolation."""
    trace: Path | None = None
    """Instead of ``rate``: a file with one arrival time in seconds per line, or a recorded trace (``traces``);
    ``--rate-scale`` divides the times."""
    session: SessionShape | None = None
    """Makes every arrival a conversation."""
    step: list[Step] = []
    """Makes every arrival an agent with these steps."""
    length_scale: Positive = 1.0
    """Factor on the lengths of a trace's prompts, blocks and answers."""
    block_tokens: Annotated[int, Field(gt=0)] = MOONCAKE_BLOCK
    """Prompt tokens per hash of a trace."""
    token_ids: tuple[int, int] = (256, 1000)
    """Bounds of the token ids that a trace's prompts are made of; all models have these as ordinary tokens."""
    max_requests: Annotated[int, Field(gt=0)] | None = None
    """Number of a trace's requests that are sent, from its beginning."""
    arrivals: Literal["poisson", "gamma", "even"] = "poisson"
    cv: Positive = 2.0
    """Coefficient of variation of the gaps of ``gamma``: 1 is Poisson, more is burstier."""
    route: Literal["chat", "completions", "typist"] = "chat"
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    max_tokens: Annotated[int, Field(gt=0)] | tuple[int, int] = (64, 112)
    """Length of answers, or the bounds between which it is drawn uniformly."""
    ignore_eos: bool = True
    """Whether answers have their full length, so that every server does the same work."""
    prompt_characters: Annotated[int, Field(gt=0)] | None = None
    """Length of built-in prompts, for the class ``long``."""
    leave_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of clients that hang up early."""
    leave_after_tokens: tuple[int, int] = (1, 32)
    """Bounds of the number of tokens after which they hang up."""
    characters_per_second: Positive = 40.0
    """Typing speed of typists."""
    extra: dict[str, Any] = {}
    """Values added to the body of every request."""

    @model_validator(mode="after")
    def _one_source_of_arrivals(self) -> Self:
        if (self.rate is None) == (self.trace is None):
            raise ValueError(f"the traffic {self.kind!r} should have either a rate or a trace")
        self._check_sessions()
        if isinstance(self.rate, list):
            times = [when for when, _ in self.rate]
            if not times or times != sorted(times) or min(times) < 0 or min(rate for _, rate in self.rate) < 0:
                raise ValueError(
                    f"the rate of {self.kind!r} should be points [second, rate] in order of time, not below 0"
                )
        elif self.rate is not None and self.rate <= 0:
            raise ValueError(f"the rate of {self.kind!r} should be above 0, not {self.rate:g}")
        for name in ("max_tokens", "leave_after_tokens"):
            bounds = getattr(self, name)
            if isinstance(bounds, tuple) and not 0 < bounds[0] <= bounds[1]:
                raise ValueError(f"{name} of {self.kind!r} should be two bounds above 0, not {list(bounds)}")
        return self

    def _check_sessions(self) -> None:
        if not self.prompts and self.trace is None:
            raise ValueError(f"the traffic {self.kind!r} has no prompts: give a class or a file")
        if not self.session and not self.step:
            return
        if (self.session is None) == (not self.step):
            raise ValueError(f"the traffic {self.kind!r} should have either a session or steps")
        if self.route != "chat":
            raise ValueError(f"the sessions of {self.kind!r} need the route chat, not {self.route!r}")
        names: list[str] = []
        for step in self.step:
            unknown = [name for name in step.after if name not in names]
            if unknown or step.name in names:
                what = f"comes after {unknown[0]!r}, which is no earlier step" if unknown else "is there twice"
                raise ValueError(f"the step {step.name!r} of {self.kind!r} {what}")
            names.append(step.name)


class ServerSetup(_Table):
    """A server that is started where no running one is given."""

    name: str
    instant: bool = False
    """Whether it runs vllm-instant, with the given deployment file or the demo's; otherwise vLLM alone."""
    draft_tokens: Annotated[int, Field(ge=0)] | None = None
    """Fixed draft length of a server without vllm-instant, with the deployment's draft model; 0 or None is none."""
    set: dict[str, Any] = {}
    """Overrides of the deployment file, by ``table.key``."""
    vllm: dict[str, Any] = {}
    """Engine arguments, in addition to the scenario's."""


class Alternation(_Table):
    """How several servers share a run."""

    seconds: Positive = 15.0
    """Length of the part of the timeline that one server gets before the next one does."""
    together: bool = False
    """Whether all servers run at the same time instead: for servers on separate machines."""
    drain_seconds: Positive = 30.0
    """Time after the end of a segment in which answers in progress can end; then they are cut off."""


class Scenario(_Table):
    """A load test; see ``docs/loadtests.md`` for the format."""

    name: str
    title: str
    description: str = ""
    seconds: Positive
    """Length of the timeline."""
    traffic: Annotated[list[Traffic], Field(min_length=1)]
    warm_up_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Length of the part of the timeline that every server gets before the run, with other prompts, unrecorded."""
    servers: list[ServerSetup] = [ServerSetup(name="ours", instant=True)]
    vllm: dict[str, Any] = {}
    """Engine arguments of all servers that are started."""
    environment: dict[str, str] = {}
    """Variables of all servers that are started."""
    alternation: Alternation = Alternation()
    goals: LoadTestGoals = LoadTestGoals()
    folder: Path = Path()
    """Folder of the files that the scenario names."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        for what, names in (
            ("servers", [server.name for server in self.servers]),
            ("kinds of traffic", [traffic.kind for traffic in self.traffic]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"several {what} are called {min(twice)!r}: give each a name of its own")
        return self

    def scaled(self, rate: float = 1.0, seconds: float | None = None) -> Scenario:
        """The scenario with every rate multiplied and the timeline stretched or compressed to ``seconds``."""
        stretch = 1.0 if seconds is None else seconds / self.seconds
        traffic = [
            one.model_copy(update={"rate": _scaled(one.rate, rate, stretch)}) if one.rate is not None else one
            for one in self.traffic
        ]
        return self.model_copy(update={"traffic": traffic, "seconds": self.seconds * stretch})


def _scaled(curve: Rate, rate: float, stretch: float) -> Rate:
    if isinstance(curve, list):
        return [(when * stretch, height * rate) for when, height in curve]
    return curve * rate


def built_in() -> dict[str, Path]:
    """The scenarios of the package, by name."""
    folder = Path(str(resources.files("vllm_instant_loadtests"))) / "scenarios"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(which: str | Path) -> Scenario:
    """A scenario by its built-in name or its file; raises ScenarioError."""
    known = built_in()
    path = known.get(str(which), Path(which))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ScenarioError(f"{which} is neither a file nor a scenario: there are {', '.join(known)}") from None
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{path} is not TOML: {error}") from None
    return parse(tables, path)


def parse(tables: Mapping[str, Any], path: Path) -> Scenario:
    """A scenario from its tables; ``path`` is where they were found."""
    try:
        return Scenario(**{"name": path.stem, "folder": path.parent, **tables})
    except ValidationError as error:
        raise ScenarioError(f"{path}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        return f"{where} is not a key of a scenario"
    if first["type"] == "missing":
        return f"{where} is missing"
    return f"{where} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def named_servers(text: str) -> dict[str, str]:
    """Addresses by name from ``NAME=URL NAME=URL …``; a single one needs no name. Raises ScenarioError."""
    found = _SERVER.findall(text)
    servers = {name or "server": url.rstrip("/").removesuffix("/v1") for name, url in found}
    unnamed = len(found) > 1 and any(not name for name, _ in found)
    if not servers or unnamed or len(servers) != len(found) or _SERVER.sub("", text).strip():
        raise ScenarioError(f"{text} should be addresses, each with a name of its own: NAME=http://HOST:PORT")
    return servers
