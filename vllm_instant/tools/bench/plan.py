"""What a bench asks for, of whom, how often."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_instant.tools.measure.closed_loop import PromptSpec
from vllm_instant.tools.measure.prompts import BUILT_IN, built_in

BASELINE, BASELINE_AGAIN, OURS = "stock", "stock again", "ours"
RESPONSE_TOKENS = 100
"""The response whose latency is a row of its own."""
_PRICE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]{3}|[$€£¥])")


class BadInputError(ValueError):
    """What the user gave cannot be used; the message is one sentence that says what and why."""


@dataclass(frozen=True)
class HourlyPrice:
    """Of the machine that a server runs on, for an hour."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> HourlyPrice:
        """``2.50USD``, ``2.50 EUR``; raises BadInputError without a currency or without a number."""
        match = _PRICE.fullmatch(text.strip())
        if match is None or float(match[1]) <= 0:
            raise BadInputError(
                f"--price-per-hour {text} is no price with its currency: write a number above 0 and the currency, "
                'as in 2.50USD or "2.50 EUR"'
            )
        return cls(float(match[1]), match[2].upper())


@dataclass(frozen=True)
class BenchPlan:
    """The measurement."""

    concurrency: tuple[int, ...] = (1, 8, 32)
    rounds: int = 6
    starts: int = 2
    """How often each server is started; rounds are dealt out evenly."""
    tokens: int = RESPONSE_TOKENS
    """Length of each answer."""
    prompts: tuple[PromptSpec, ...] | None = None
    """The user's; None for the built-in classes."""
    ttft_slo_ms: float | None = None
    itl_slo_ms: float | None = None
    texts: int = 16
    """Held-out texts that are read for perplexity and divergence; 0 leaves the quality rows out."""
    answers: int = 24
    """Prompts that are answered greedily and by sampling for the quality rows."""
    salt: str = "0"
    """Of the random choices; another salt gives other prompts."""

    def setup(self) -> dict[str, Any]:
        """What must stay the same when an interrupted run goes on, as JSON types."""
        texts = json.dumps([[p.text, p.kind, p.temperature] for p in self.prompts or ()])
        return {
            "concurrency": list(self.concurrency),
            "rounds": self.rounds,
            "starts": self.starts,
            "tokens": self.tokens,
            "prompts": hashlib.sha256(texts.encode()).hexdigest()[:12] if self.prompts else "built-in",
            "texts": self.texts,
            "answers": self.answers,
        }

    def rounds_of(self, start: int) -> list[int]:
        """The numbers of the rounds that the servers of one start take."""
        return [number for number in range(self.rounds) if number * self.starts // self.rounds == start]

    def requests(self, concurrency: int) -> int:
        """How many prompts a turn has: as many as users, and of each built-in class the same number."""
        return -(-concurrency // len(BUILT_IN)) * len(BUILT_IN)

    def prompts_of(self, number: int, concurrency: int, attempt: int = 0) -> list[PromptSpec]:
        """The prompts of one round, which all arms get; no other round has them while there are enough.

        Args:
            number: of the round; ``-1`` is the warm-up.
            concurrency: users.
            attempt: counts how often the run was started again, since a server may remember what it was asked.

        """
        count = self.requests(concurrency)
        if self.prompts is None:
            return built_in(count, f"{self.salt}/{attempt}/{concurrency}/{number}")
        order = random.Random(f"{self.salt}/{attempt}").sample(self.prompts, len(self.prompts))
        # Every level of concurrency takes its share of each round.
        before = self.concurrency.index(concurrency)
        a_round = sum(map(self.requests, self.concurrency))
        first = (number + 1) * a_round + sum(map(self.requests, self.concurrency[:before]))
        return [order[(first + i) % len(order)] for i in range(count)]

    def repeats(self) -> float:
        """How often each of the user's prompts is asked; 1 or less is fresh every time."""
        asked = (self.rounds + 1) * sum(map(self.requests, self.concurrency))
        return asked / len(self.prompts) if self.prompts else 0.0


SHORT: Mapping[str, Any] = {"concurrency": (4,), "rounds": 6, "starts": 1, "texts": 4, "answers": 8}
"""The short form: one level of concurrency, servers started once."""


def read_prompts(file: Path) -> tuple[PromptSpec, ...]:
    """A file with one prompt a line, or (``.jsonl``) one object a line: ``prompt``, ``class``, ``temperature``.

    Raises:
        BadInputError: when there is nothing to read or a line is no such object.

    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"--prompts {file} cannot be read: {error}") from None
    if not lines:
        raise BadInputError(f"--prompts {file} has no prompts: write one a line")
    if file.suffix != ".jsonl":
        return tuple(PromptSpec(line, 0.0, "prompts") for line in lines)
    return tuple(_prompt(file, number, line) for number, line in enumerate(lines, 1))


def _prompt(file: Path, number: int, line: str) -> PromptSpec:
    try:
        given = json.loads(line)
        return PromptSpec(
            str(given["prompt"]), float(given.get("temperature", 0.0)), str(given.get("class", "prompts"))
        )
    except (ValueError, KeyError, TypeError):
        raise BadInputError(
            f'--prompts {file}: object {number} should be like {{"prompt": "…", "class": "…", "temperature": 0}}'
        ) from None


def deployed(arms: Sequence[str]) -> list[str]:
    """The arms that are compared with stock."""
    return [arm for arm in arms if arm not in (BASELINE, BASELINE_AGAIN)]
