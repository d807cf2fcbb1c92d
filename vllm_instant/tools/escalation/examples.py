"""Prompts with the answers of both ends, how good they are and what they cost."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from vllm_instant.tools.measure.http_client import base_url, sync_client

Scorer = Callable[[Mapping[str, Any], str], float]
"""Returns how good an answer is, from 0 to 1, given the line of its prompt."""
ENDS = ("fast", "deep")
REQUEST_KEYS = ("messages", "prompt", "tools", "max_tokens")
"""The keys of a line that belong to the request."""
COSTS = ("cost", "seconds")
"""What answers may cost, in the order in which it is looked for: ``fast_cost``, then ``fast_seconds``."""


@dataclass(frozen=True)
class Example:
    """One prompt."""

    body: Mapping[str, Any]
    """The request, with ``prompt`` or ``messages``."""
    fast_score: float
    deep_score: float
    fast_cost: float
    deep_cost: float


def read_examples(path: Path, scorer: Scorer | None = None) -> tuple[list[Example], str]:
    """Read a file, one JSON object per line; returns the examples and the name of their cost.

    Args:
        path: The file.
        scorer: Scores the answers; None where the lines have scores.

    Raises:
        ValueError: With one sentence, if the file is not valid.

    """
    lines = list(read_lines(path))
    cost = next((name for name in COSTS if all(f"{end}_{name}" in line for line in lines for end in ENDS)), None)
    examples = []
    for number, line in enumerate(lines, start=1):
        try:
            fast, deep = (
                float(line[f"{end}_score"]) if scorer is None else float(scorer(line, str(line[end]))) for end in ENDS
            )
            costs = [1.0 if end == "deep" else 0.0 for end in ENDS]
            if cost is not None:
                costs = [float(line[f"{end}_{cost}"]) for end in ENDS]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} has no {error}") from None
        if not 0 <= fast <= 1 or not 0 <= deep <= 1:
            raise ValueError(f"{path}, line {number}: scores must lie in 0..1, found {fast} and {deep}")
        body: dict[str, Any] = {key: line[key] for key in REQUEST_KEYS if key in line}
        examples.append(Example(body, fast, deep, *costs))
    return examples, cost or "share of deep answers"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file with prompts; raises ValueError, with one sentence, where one is not valid."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    for number, text in enumerate(content.splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            raise ValueError(f"{path}, line {number} is no JSON") from None
        if not isinstance(line, dict) or not ("prompt" in line or "messages" in line):
            raise ValueError(f"{path}, line {number} has neither prompt nor messages")
        yield line


def exact_match(line: Mapping[str, Any], answer: str) -> float:
    """1 where an answer is the line's ``reference`` but for white space."""
    return float(answer.split() == str(line["reference"]).split())


def function_scorer(name: str) -> Scorer:
    """Return the user's function ``package.module:function``; raises ValueError where there is none."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"there is no function {name}: {error}") from None
    if not callable(found):
        raise ValueError(f"{name} is no function")
    return found  # type: ignore[no-any-return]


_QUESTION = (
    "Grade the answer to a user's request from 0 (useless or wrong) to 10 (correct and complete). "
    "Reply with the number only.\n\n[Request]\n{request}\n\n[Answer]\n{answer}\n\n[Grade]"
)
_GRADE = re.compile(r"\b(10|\d)\b")


class Judge:
    """A model at an OpenAI-compatible URL that grades each answer alone.

    Args:
        url: Address of the server.
        model: Name of the model there.
        headers: Of the requests, with the key.
        client: By default one for the address.

    """

    def __init__(
        self, url: str, model: str, headers: Mapping[str, str] | None = None, client: httpx.Client | None = None
    ) -> None:
        self._model = model
        self._client = client or sync_client(base_url(url), timeout=120, headers=dict(headers or {}))

    def __call__(self, line: Mapping[str, Any], answer: str) -> float:
        """Return the grade, from 0 to 1; raises ValueError where there is none."""
        request = line["prompt"] if "prompt" in line else json.dumps(line["messages"])
        content = _QUESTION.format(request=request, answer=answer)
        body = {
            "model": self._model,
            "max_tokens": 8,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        try:
            response = self._client.post("/v1/chat/completions", json=body)
            response.raise_for_status()
            said = str(response.json()["choices"][0]["message"]["content"])
        except (httpx.HTTPError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"the judge does not answer: {type(error).__name__}: {error}") from None
        grade = _GRADE.search(said)
        if grade is None:
            raise ValueError(f"the judge gave no grade: {said[:80]!r}")
        return int(grade[1]) / 10
