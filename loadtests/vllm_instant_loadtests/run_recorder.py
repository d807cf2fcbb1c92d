"""The raw data of a load test: a folder of JSON lines, written while it runs and read by the analysis.

All times are seconds after the beginning of the run, on one clock. Files: ``run.json`` (the description of the run),
``requests.jsonl``, ``samples.jsonl`` (the servers' ``/metrics``), ``steps.jsonl`` (the servers' decision traces, where
they have one), ``client.jsonl`` (delays of the load generator itself), ``events.jsonl`` (injected disturbances: the
ground truth of a run with disturbances). A line that was cut off by a kill is skipped when it is read.

``run.json`` has

* ``scenario``: ``name``, ``title``, ``description``, ``seconds`` (length of its timeline), ``kinds`` (of traffic);
* ``goals``: the scenario's table, see ``goals.LoadTestGoals``;
* ``servers``: a list of ``name``, ``url``, ``model``, ``version``, ``deployment`` (its command line; empty
  if unknown) and ``instant`` (whether vllm-instant runs in it);
* ``segments``: a list of ``server``, ``began`` and ``ended`` (after the last answer), ``from`` and ``until`` (the
  part of the scenario's timeline that was played) and ``number``: all servers get the same part, with the same prompts,
  in segments of the same number. With ``together`` (also in ``run.json``) they get it at the same time;
* ``began`` (ISO date), ``clock`` (what ``time.perf_counter`` said at second 0 on the machine of the load generator),
  ``finished`` (false until the run is complete) and ``environment_info`` (machine, versions, command).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from pydantic import TypeAdapter


@dataclass(frozen=True)
class RecordedRequest:
    """One request and its answer."""

    id: str
    """The server's request id, for searching its log and decision trace."""
    server: str
    """Name of the server."""
    kind: str
    """The kind of traffic, e.g. "creative"."""
    route: str
    """``chat``, ``completions`` or ``typist``."""
    due: float
    """When it was due; latencies count from here (no coordinated omission)."""
    sent: float
    """When it was sent."""
    arrivals: list[tuple[float, int]]
    """``(when, tokens so far)`` for everything that arrived together."""
    ended: float
    """When its answer or the connection ended."""
    prompt_tokens: int | None = None
    """Length of the prompt, where the server reports it."""
    error: str | None = None
    """Why it failed; None if it did not. An intended disconnect is no error."""
    left: bool = False
    """Whether the client hung up on purpose."""
    segment: int | None = None
    """Number of its segment."""
    number: int | None = None
    """Its number in the scenario: every server gets the same prompt under the same number."""
    session: int | None = None
    """Number of its session; None for a request of its own."""
    turn: int = 0
    """Its place in the session, from 0; parallel calls have places of their own."""
    accepted: int | None = None
    """Accepted draft tokens, where the server reports them."""
    answer_at: float | None = None
    """When the first token after the thinking ones arrived; None where the server reports no thinking."""
    thinking_tokens: int = 0
    """Number of tokens before that one."""
    answered_by: str = ""
    """``fast`` or ``deep``: the end that answered, where the server says so."""

    @property
    def answer_ttft(self) -> float:
        """Seconds from when it was due to the first token of the answer itself; infinite where it only thought."""
        if self.answer_at is not None:
            return self.answer_at - self.due
        return float("inf") if self.thinking_tokens else self.ttft

    @property
    def ttft(self) -> float:
        """Seconds from when it was due to its first token; NaN without one."""
        return self.arrivals[0][0] - self.due if self.arrivals else float("nan")

    @property
    def tokens(self) -> int:
        """Number of output tokens that arrived."""
        return self.arrivals[-1][1] if self.arrivals else 0


@dataclass(frozen=True)
class MetricsSample:
    """One reading of a server's ``/metrics``."""

    server: str
    at: float
    """When the answer had arrived."""
    took: float
    """Seconds until the answer."""
    values: dict[str, float]
    """By metric name (``vllm:…``, ``vllm_instant_…``), summed over labels; histograms as ``…_sum`` and ``…_count``."""


@dataclass(frozen=True)
class DecisionSample:
    """One entry of a decision trace, placed on the run's clock."""

    server: str
    at: float
    decision: dict[str, Any]
    """In the format of ``vllm-instant explain --json``."""


@dataclass(frozen=True)
class GeneratorSample:
    """The state of the load generator itself."""

    at: float
    late: float
    """Maximum delay of its event loop's timers since the previous reading, seconds."""
    cpu: float
    """Share of one core that its process used since the previous reading."""
    process: int = 0
    """Number of the process among several load generators."""


@dataclass(frozen=True)
class Disturbance:
    """An injected disturbance of a server."""

    server: str
    cause: str
    """One of ``causes.CAUSES``."""
    began: float
    ended: float
    note: str = ""


@dataclass
class RecordedRun:
    """The description of a run and everything that was recorded."""

    about: dict[str, Any]
    """The contents of ``run.json``."""
    requests: list[RecordedRequest] = field(default_factory=list)
    samples: list[MetricsSample] = field(default_factory=list)
    steps: list[DecisionSample] = field(default_factory=list)
    client: list[GeneratorSample] = field(default_factory=list)
    events: list[Disturbance] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """A recorded run; raises FileNotFoundError if ``folder`` has none."""
        about = json.loads((folder / "run.json").read_text())
        read = {
            name: [adapter.validate_python(values) for values in _lines(folder / f"{name}.jsonl")]
            for name, adapter in _ADAPTERS.items()
        }
        return cls(about, **read)

    def of(self, server: str) -> RecordedRun:
        """The part of the run that concerns one server."""
        return RecordedRun(
            self.about,
            _only(self.requests, server),
            _only(self.samples, server),
            _only(self.steps, server),
            self.client,
            _only(self.events, server),
        )


class RunRecorder:
    """Writes a run while it happens; every record is on disk at once, so that a killed run can be analysed.

    Args:
        folder: made if it is missing; must not hold another run (FileExistsError).
        about: the description of the run; None to add to one that another process has created.

    """

    def __init__(self, folder: Path, about: Mapping[str, Any] | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if about is not None:
            with (folder / "run.json").open("x") as file:
                json.dump(about, file, indent=2)
        self.folder = folder
        self._files: dict[str, IO[str]] = {}

    def add(self, record: RecordedRequest | MetricsSample | DecisionSample | GeneratorSample | Disturbance) -> None:
        """Append one record."""
        name = _FILES[type(record)]
        if name not in self._files:
            self._files[name] = (self.folder / f"{name}.jsonl").open("a", buffering=1)
        self._files[name].write(json.dumps(plain(record)) + "\n")

    def update(self, about: Mapping[str, Any]) -> None:
        """Replace the description of the run."""
        new = self.folder / "run.json.new"
        new.write_text(json.dumps(about, indent=2))
        new.replace(self.folder / "run.json")

    def close(self) -> None:
        """Close the files; idempotent."""
        for file in self._files.values():
            file.close()
        self._files.clear()


_FILES: dict[type, str] = {
    RecordedRequest: "requests",
    MetricsSample: "samples",
    DecisionSample: "steps",
    GeneratorSample: "client",
    Disturbance: "events",
}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for kind, name in _FILES.items()}
_OfServer = TypeVar("_OfServer", RecordedRequest, MetricsSample, DecisionSample, Disturbance)


def plain(record: RecordedRequest | MetricsSample | DecisionSample | GeneratorSample | Disturbance) -> dict[str, Any]:
    """The record as JSON types."""
    values = asdict(record)
    if isinstance(record, RecordedRequest):
        values["arrivals"] = [[round(when, 5), tokens] for when, tokens in record.arrivals]
    return values


def request(values: Mapping[str, Any]) -> RecordedRequest:
    """The request that ``plain`` describes."""
    found: RecordedRequest = _ADAPTERS["requests"].validate_python(values)
    return found


def _only(records: list[_OfServer], server: str) -> list[_OfServer]:
    return [record for record in records if record.server == server]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
