"""Prompts of load tests: built-in classes and files; another seed gives other prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from vllm_instant.tools.demo.prompt_sets import PROMPT_SETS
from vllm_instant.tools.measure import prompts as bench_prompts
from vllm_instant.tools.measure.closed_loop import PromptSpec

_FORMS = ("poem", "short story", "letter", "fairy tale", "song", "monologue", "dialogue", "diary entry")
_MOODS = ("cheerful", "gloomy", "absurd", "solemn", "mysterious", "tender", "furious", "dreamlike")
_THINGS = (
    *("lighthouse", "violin", "glacier", "postman", "clock", "orchard", "comet", "harbour", "mirror", "fox", "bakery"),
    *("umbrella", "desert", "library", "train", "island", "thunderstorm", "chessboard", "garden", "lantern", "whale"),
)
_LONG = 3000


@dataclass(frozen=True)
class LoadPrompt:
    """One prompt: a text, or a conversation up to the user's last message."""

    text: str
    before: list[dict[str, str]] = field(default_factory=list)
    """Earlier messages, as OpenAI's ``messages``."""
    temperature: float | None = None
    """Sampling temperature, where the file has one."""


def creative(count: int, seed: str) -> list[str]:
    """Requests for invented text, the hardest to draft."""
    choose = random.Random(seed)
    made = []
    for _ in range(count):
        first, second, third = choose.sample(_THINGS, 3)
        mood, form = choose.choice(_MOODS), choose.choice(_FORMS)
        made.append(
            f"Write a {mood} {form} in which a {first} meets a {second} and neither of them mentions the {third}.\n"
        )
    return made


def long(count: int, seed: str, characters: int = _LONG) -> list[str]:
    """Long documents, each another mixture of pieces, for prefill rather than decoding."""
    choose = random.Random(seed)
    texts = [text for text in bench_prompts.held_out_texts(200) if len(text) > 600]
    made = []
    for number in range(count):
        pieces = [f"Document {seed}/{number}."]
        while sum(map(len, pieces)) < characters:
            text = choose.choice(texts)
            start = choose.randrange(len(text) - 500)
            pieces.append(text[start : start + 500])
        made.append("\n\n".join(pieces)[:characters])
    return made


def requests_to_assistants(name: str, count: int, seed: str) -> list[LoadPrompt]:
    """What people ask an assistant, of a set of ``prompt_sets``; for the chat route, whose template the model has."""
    return [
        LoadPrompt(last["content"], [dict(turn) for turn in before], PROMPT_SETS[name].temperature)
        for *before, last in PROMPT_SETS[name].conversations(count, seed)
    ]


def _of(make: Callable[[int, str], list[PromptSpec]]) -> Callable[[int, str], list[LoadPrompt]]:
    return lambda count, seed: [LoadPrompt(prompt.text) for prompt in make(count, seed)]


BUILT_IN: dict[str, Callable[[int, str], list[LoadPrompt]]] = {
    **{name: _of(make) for name, make in bench_prompts.BUILT_IN.items()},
    "repetitive": _of(bench_prompts.records),
    "creative": lambda count, seed: list(map(LoadPrompt, creative(count, seed))),
    "long": lambda count, seed: list(map(LoadPrompt, long(count, seed))),
    **{name: partial(requests_to_assistants, name) for name in PROMPT_SETS},
}
"""By class: ``make(count, seed)``; some return fewer than ``count``."""


def of_class(name: str, count: int, seed: str, characters: int | None = None) -> list[LoadPrompt]:
    """``count`` different prompts of a built-in class; only ``long`` uses ``characters``."""
    made: dict[str, LoadPrompt] = {}
    part = 0
    while len(made) < count:
        more, before, part = count - len(made), len(made), part + 1
        found = BUILT_IN[name](more, f"{seed}/{part}")
        if name == "long":
            found = list(map(LoadPrompt, long(more, f"{seed}/{part}", characters or _LONG)))
        made |= {_key(prompt): prompt for prompt in found}
        if (
            part > 1 and len(made) - before < more / 4
        ):  # the class is exhausted: a number makes a known prompt a new one
            numbered = [
                replace(prompt, text=f"# {seed}/{part}/{number}\n{prompt.text}") for number, prompt in enumerate(found)
            ]
            made |= {_key(prompt): prompt for prompt in numbered}
    return list(made.values())[:count]


def _key(prompt: LoadPrompt) -> str:
    return json.dumps([prompt.before, prompt.text])


def from_file(file: Path) -> list[LoadPrompt]:
    """The prompts of a file.

    ``.txt``: one per line. ``.jsonl`` (or a JSON list): objects with a ``prompt`` (and ``temperature``), with OpenAI's
    ``messages``, or with ``conversations`` as ShareGPT has them, up to the last message of the user.

    Raises:
        ValueError: in one sentence, when the file has no prompts or an entry is none of these.

    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if file.suffix not in (".json", ".jsonl"):
        found = [LoadPrompt(line) for line in text.splitlines() if line.strip()]
    else:
        found = [_entry(file, number, entry) for number, entry in enumerate(_entries(file, text), 1)]
    if not found:
        raise ValueError(f"{file} has no prompts")
    return found


def _entries(file: Path, text: str) -> Sequence[Any]:
    try:
        whole = text.lstrip().startswith("[")
        return list(json.loads(text)) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{file} is neither a JSON list nor one JSON object per line: {error}") from None


def _entry(file: Path, number: int, entry: Any) -> LoadPrompt:
    try:
        temperature = None if entry.get("temperature") is None else float(entry["temperature"])
        if "prompt" in entry:
            return LoadPrompt(str(entry["prompt"]), temperature=temperature)
        turns = [_turn(turn) for turn in entry["messages"] if turn] if "messages" in entry else _shared(entry)
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
        return LoadPrompt(turns[last]["content"], turns[:last], temperature)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{file}: object {number} should have a prompt, messages or conversations with a message of the user"
        ) from None


def _turn(turn: Any) -> dict[str, str]:
    return {"role": str(turn["role"]), "content": str(turn["content"])}


def _shared(entry: Any) -> list[dict[str, str]]:
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    return [{"role": roles[turn["from"]], "content": str(turn["value"])} for turn in entry["conversations"]]
