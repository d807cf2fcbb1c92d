"""Prompts by class, made from text that every Python installation has; another seed gives other prompts."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

from vllm_instant.tools.demo.corpus import Document, documents
from vllm_instant.tools.measure.closed_loop import PromptSpec

CHARACTERS = 140
"""Length of a beginning, in characters."""


def snippets(kind: str, temperature: float, count: int, seed: int | str) -> list[PromptSpec]:
    """Beginnings to continue, from documents that the demo models were not trained on, cut at line ends."""
    texts = [text for text in _held_out(kind) if len(text) > 4 * CHARACTERS]
    choose = random.Random(seed)
    prompts: list[PromptSpec] = []
    while len(prompts) < count:
        text = choose.choice(texts)
        start = text.find("\n", choose.randrange(len(text) - CHARACTERS)) + 1
        beginning = text[start : start + CHARACTERS]
        # Blank lines at the end of a document are no prompt; drawing again with the same seed would never end.
        if beginning.strip():
            prompts.append(PromptSpec(beginning, temperature, kind))
    return prompts


def records(count: int, seed: int | str) -> list[PromptSpec]:
    """Repetitive structured text: a few records, repeated."""
    choose = random.Random(seed)
    lines = [line for text in _held_out("structured") for line in text.splitlines() if 80 < len(line) < 140]
    prompts = []
    for _ in range(count):
        chosen = choose.sample(lines, 3)
        prompts.append(PromptSpec("\n".join([*chosen, *chosen, chosen[0][:60]]), 0.0, "repetitive"))
    return prompts


def sums(count: int, seed: int | str) -> list[PromptSpec]:
    """Math-like text: one sum per line."""
    choose = random.Random(seed)
    prompts = []
    for _ in range(count):
        pairs = [(choose.randrange(10, 99), choose.randrange(10, 99)) for _ in range(8)]
        prompts.append(PromptSpec("\n".join(f"x = {a} + {b}  # {a + b}" for a, b in pairs) + "\nx =", 0.0, "math-like"))
    return prompts


def free(count: int, seed: int | str) -> list[PromptSpec]:
    """Open-ended text: beginnings to continue at temperature 1."""
    return [PromptSpec(prompt.text, 1.0, "free") for prompt in snippets("code", 1.0, count, seed)]


BUILT_IN: dict[str, Callable[[int, str], list[PromptSpec]]] = {
    "code": lambda count, seed: snippets("code", 0.0, count, seed),
    "structured": lambda count, seed: snippets("structured", 0.0, count, seed),
    "math-like": sums,
    # Other texts than the code class, which a prefix cache would hold.
    "free": lambda count, seed: free(count, f"{seed}/free"),
}
"""By class: ``make(count, seed)``; the classes are predictable in different ways."""


def built_in(count: int, seed: str) -> list[PromptSpec]:
    """``count`` prompts, cycling through the classes."""
    made = {name: make(-(-count // len(BUILT_IN)), seed) for name, make in BUILT_IN.items()}
    names = list(made)
    return [made[names[i % len(names)]][i // len(names)] for i in range(count)]


def held_out_texts(count: int, characters: int = 1500) -> list[str]:
    """Beginnings of documents that the demo models were not trained on, code and structured ones."""
    return [document.text[:characters] for document in _documents() if len(document.text) > 400][:count]


@functools.cache
def _documents() -> tuple[Document, ...]:
    return tuple(documents(held_out_only=True))


def _held_out(kind: str) -> list[str]:
    return [document.text for document in _documents() if document.kind == kind]
