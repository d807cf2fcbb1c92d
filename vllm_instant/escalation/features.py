"""What a learned rule sees of a request: counts and shares of its text, its form, and words of a learned vocabulary."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant.escalation.requests import prompt_text

_WORD = re.compile(r"[^\W\d_]{2,}|\d+")
_CODE = re.compile(r"```|[{};]|\b(?:def|class|return|import|function|const|SELECT)\b|=>|==")
# Counted in C: a loop over letters would take milliseconds of the event loop.
_DIGIT = re.compile(r"\d")
_UPPER_CASE = re.compile(r"[A-Z]")
_MATHS = "=+-*/^<>%√∑∫≤≥"

FORM = (
    "characters",
    "words",
    "word_length",
    "digits",
    "upper_case",
    "not_ascii",
    "maths",
    "code",
    "questions",
    "lines",
    "messages",
    "tools",
    "schema",
    "max_tokens",
)
"""The names of the features of a request's form, in order."""
MAX_CHARACTERS = 8_000
"""Characters of a prompt that are looked at, half of them at its beginning and half at its end."""


def shown_text(text: str) -> str:
    """Return the part of a prompt that is looked at, so that a decision takes a bounded time."""
    half = MAX_CHARACTERS // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]}\n{text[-half:]}"


def words_of(text: str) -> list[str]:
    """Return the words and numbers of a text in lower case."""
    return _WORD.findall(text.lower())


def features_of(body: Mapping[str, Any], vocabulary: Mapping[str, int]) -> npt.NDArray[np.float64]:
    """Return the features of a request, ``[len(FORM) + len(vocabulary)]``.

    Args:
        body: The request's JSON.
        vocabulary: Words and their positions behind the features of the form; a word that occurs counts 1.

    """
    whole = prompt_text(body)
    text = shown_text(whole)
    words = words_of(text)
    form = _form(body, len(whole), text, words)
    features = np.zeros(len(FORM) + len(vocabulary))
    features[: len(FORM)] = form
    for word in set(words):
        if (position := vocabulary.get(word)) is not None:
            features[len(FORM) + position] = 1.0
    return features


def _form(body: Mapping[str, Any], length: int, text: str, words: Sequence[str]) -> list[float]:
    size = max(1, len(text))
    messages = body.get("messages")
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    return [
        math.log1p(length),
        math.log1p(len(words)),
        sum(map(len, words)) / max(1, len(words)),
        len(_DIGIT.findall(text)) / size,
        len(_UPPER_CASE.findall(text)) / size,
        (len(text) - len(text.encode("ascii", "ignore"))) / size,
        sum(map(text.count, _MATHS)) / size,
        math.log1p(len(_CODE.findall(text))),
        math.log1p(text.count("?")),
        math.log1p(text.count("\n")),
        math.log1p(len(messages) if isinstance(messages, list) else 1),
        float(bool(body.get("tools"))),
        float(bool(body.get("response_format") or body.get("structured_outputs"))),
        math.log1p(limit) if isinstance(limit, int) and limit > 0 else 0.0,
    ]
