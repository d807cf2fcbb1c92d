"""A load test as a TOML file: what arrives when, at which servers, and what is good enough."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_instant_loadtests.goals import LoadTestGoals

Rate = float | list[tuple[float, float]]
_SERVER = re.compile(r"(?:^|\s)(?:([^\s=/]+)=)?(https?://[^\s/]\S*)")
Positive = Annotated[float, Field(gt=0)]


class ScenarioError(ValueError):
    """A scenario cannot be used; the message is one sentence: where, what was found, what would be valid."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Traffic(_Table):
    """One kind of request and when it arrives."""

    kind: str
    """Its name in the results."""
    prompts: str
    """A built-in class (``prompts.BUILT_IN``) or a file, relative to the scenario's folder."""
    rate: Rate | None = None
    """Requests a second, or points ``[second, rate]`` with straight lines between them."""
    trace: Path | None = None
    """Instead of ``rate``: a file with one arrival time a line, in seconds; it plays faster under ``--rate-scale``."""
    arrivals: Literal["poisson", "gamma", "even"] = "poisson"
    cv: Positive = 2.0
    """Coefficient of variation of gamma's gaps: 1 is Poisson, more is burstier."""
    route: Literal["chat", "completions", "typist"] = "chat"
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    max_tokens: Annotated[int, Field(gt=0)] | tuple[int, int] = (64, 112)
    """Length of answers, or bounds between which they are drawn."""
    ignore_eos: bool = True
    """Answers have their whole length, so that every server does the same work."""
    prompt_characters: Annotated[int, Field(gt=0)] | None = None
    """Length of built-in prompts, where it can be chosen."""
    leave_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of clients that hang up."""
    leave_after_tokens: tuple[int, int] = (1, 32)
    """After how many tokens they do."""
    characters_per_second: Positive = 40.0
    """How fast typists type."""
    extra: dict[str, Any] = {}
    """Added to the body of every request."""

    @model_validator(mode="after")
    def _one_source_of_arrivals(self) -> Self:
        if (self.rate is None) == (self.trace is None):
            raise ValueError(f"the traffic {self.kind!r} should have either a rate or a trace")
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


class ServerSetup(_Table):
    """A server that is started where none is given."""

    name: str
    instant: bool = False
    """With vllm-instant and the deployment file that was given, or the demo's; else stock vLLM."""
    draft_tokens: Annotated[int, Field(ge=0)] | None = None
    """Fixed draft length of a stock server with the demo's draft model; 0 or None is no speculation."""
    set: dict[str, Any] = {}
    """Values of the deployment file to override, by ``table.key``."""
    vllm: dict[str, Any] = {}
    """Engine arguments, over the scenario's."""


class Alternation(_Table):
    """How several servers share a run."""

    seconds: Positive = 15.0
    """Of the timeline that a server plays before the next one's turn."""
    together: bool = False
    """All at the same time instead: for servers on machines of their own."""
    drain_seconds: Positive = 30.0
    """After which an answer that is still under way at the end of a segment is cut off."""


class Scenario(_Table):
    """A load test; see ``docs/loadtests.md`` for the format."""

    name: str
    title: str
    description: str = ""
    seconds: Positive
    """Length of the timeline."""
    traffic: Annotated[list[Traffic], Field(min_length=1)]
    warm_up_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Of the timeline that every server plays before the run, with other prompts; nothing of it is recorded."""
    servers: list[ServerSetup] = [ServerSetup(name="ours", instant=True)]
    vllm: dict[str, Any] = {}
    """Engine arguments of all servers that are started."""
    environment: dict[str, str] = {}
    """Variables of all servers that are started."""
    alternation: Alternation = Alternation()
    goals: LoadTestGoals = LoadTestGoals()
    folder: Path = Path()
    """Where the files lie that it names."""

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
        """The same with every rate multiplied, and with the timeline stretched or pressed to ``seconds``."""
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
    """The scenarios that the package brings along, by name."""
    folder = Path(str(resources.files("vllm_instant_loadtests"))) / "scenarios"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(which: str | Path) -> Scenario:
    """A built-in scenario by its name, or one from a file; raises ScenarioError."""
    known = built_in()
    path = known.get(str(which), Path(which))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ScenarioError(f"{which} is neither a file nor a scenario: there are {', '.join(known)}") from None
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{path} is no TOML: {error}") from None
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
        return f"{where} is no key of a scenario"
    if first["type"] == "missing":
        return f"{where} is missing"
    return f"{where} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def named_servers(text: str) -> dict[str, str]:
    """``NAME=URL NAME=URL …`` as addresses by name; one alone needs no name. Raises ScenarioError."""
    found = _SERVER.findall(text)
    servers = {name or "server": url.rstrip("/").removesuffix("/v1") for name, url in found}
    unnamed = len(found) > 1 and any(not name for name, _ in found)
    if not servers or unnamed or len(servers) != len(found) or _SERVER.sub("", text).strip():
        raise ScenarioError(f"{text} should be addresses, each with a name of its own: NAME=http://HOST:PORT")
    return servers
