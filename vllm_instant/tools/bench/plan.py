"""What a bench measures: users, rounds, prompts, prices."""

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

BASELINE, BASELINE_AGAIN, OURS = "vLLM", "vLLM again", "ours"
"""The arms of every bench: vLLM alone, a second server of it, the deployment."""
OLD_NAMES = {"stock": BASELINE, "stock again": BASELINE_AGAIN}
"""Names of arms in results of format 1."""
RESPONSE_TOKENS = 100
"""Length of the response whose latency is a row of its own."""
_PRICE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]{3}|[$€£¥])")


class BadInputError(ValueError):
    """An option cannot be used; the message is one sentence that says what and why."""


@dataclass(frozen=True)
class HourlyPrice:
    """Price of the machine that a server runs on, per hour."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> HourlyPrice:
        """``2.50USD``, ``2.50 EUR``; raises BadInputError without a currency or without a number."""
        match = _PRICE.fullmatch(text.strip())
        if match is None or float(match[1]) <= 0:
            raise BadInputError(
                f"--price-per-hour {text} is not a price with its currency: write a number above 0 and the currency, "
                'as in 2.50USD or "2.50 EUR"'
            )
        return cls(float(match[1]), match[2].upper())


@dataclass(frozen=True)
class BenchPlan:
    """The measurement."""

    concurrency: tuple[int, ...] = (1, 8, 32)
    rounds: int = 6
    """Number of rounds; of the first stage where there are several."""
    starts: int = 2
    """Number of server starts per stage, with equally many rounds each."""
    max_rounds: int | None = None
    """Limit for rounds that are added while a row is undecided; None adds none."""
    tokens: int = RESPONSE_TOKENS
    """Length of each answer."""
    prompts: tuple[PromptSpec, ...] | None = None
    """The user's prompts; None for the built-in classes."""
    ttft_slo_ms: float | None = None
    itl_slo_ms: float | None = None
    texts: int = 16
    """Number of held-out texts for perplexity and divergence; 0 leaves the quality rows out."""
    answers: int = 24
    """Number of prompts that are answered greedily and by sampling for the quality rows."""
    salt: str = "0"
    """Of all random choices; another salt gives other prompts."""

    def setup(self) -> dict[str, Any]:
        """The settings that an interrupted run must keep when it is resumed, as JSON types."""
        texts = json.dumps([[p.text, p.kind, p.temperature] for p in self.prompts or ()])
        return {
            "concurrency": list(self.concurrency),
            "rounds": self.rounds,
            "starts": self.starts,
            "max_rounds": self.max_rounds,
            "tokens": self.tokens,
            "prompts": hashlib.sha256(texts.encode()).hexdigest()[:12] if self.prompts else "built-in",
            "texts": self.texts,
            "answers": self.answers,
        }

    @property
    def stage_ends(self) -> list[int]:
        """Total number of rounds after each stage; each stage doubles it, up to ``max_rounds``."""
        ends = [self.rounds]
        while self.max_rounds is not None and ends[-1] < self.max_rounds:
            ends.append(min(2 * ends[-1], self.max_rounds))
        return ends

    def rounds_of(self, start: int, stage: int = 0) -> list[int]:
        """The numbers of the rounds that the servers of one start of a stage take."""
        first, end = [0, *self.stage_ends][stage], self.stage_ends[stage]
        return [number for number in range(first, end) if (number - first) * self.starts // (end - first) == start]

    def requests(self, concurrency: int) -> int:
        """Number of prompts per round: at least one per user, and equally many of each built-in class."""
        return -(-concurrency // len(BUILT_IN)) * len(BUILT_IN)

    def prompts_of(self, number: int, concurrency: int, attempt: int = 0) -> list[PromptSpec]:
        """The prompts of one round, the same for all arms; no other round has them while there are enough.

        Args:
            number: of the round; ``-1`` is the warm-up.
            concurrency: number of users.
            attempt: how often the run was resumed, since prefix caches may know the prompts of an earlier attempt.

        """
        count = self.requests(concurrency)
        if self.prompts is None:
            return built_in(count, f"{self.salt}/{attempt}/{concurrency}/{number}")
        order = random.Random(f"{self.salt}/{attempt}").sample(self.prompts, len(self.prompts))
        # Within a round, every level of concurrency has its own share of the prompts.
        before = self.concurrency.index(concurrency)
        per_round = sum(map(self.requests, self.concurrency))
        first = (number + 1) * per_round + sum(map(self.requests, self.concurrency[:before]))
        return [order[(first + i) % len(order)] for i in range(count)]

    def repeats(self) -> float:
        """How often each of the user's prompts is sent; at most 1 means that every request has a new one."""
        asked = (self.rounds + 1) * sum(map(self.requests, self.concurrency))
        return asked / len(self.prompts) if self.prompts else 0.0


SHORT: Mapping[str, Any] = {"concurrency": (4,), "rounds": 6, "starts": 1, "texts": 4, "answers": 8}
"""The settings of ``--short``: one level of concurrency, servers started once."""


def read_prompts(file: Path) -> tuple[PromptSpec, ...]:
    """Prompts from a file: one per line, or (``.jsonl``) objects with ``prompt``, ``class`` and ``temperature``.

    Raises:
        BadInputError: when the file cannot be read, is empty, or a line is not such an object.

    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"--prompts {file} cannot be read: {error}") from None
    if not lines:
        raise BadInputError(f"--prompts {file} has no prompts: write one per line")
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
    """The arms that are compared with the baseline."""
    return [arm for arm in arms if arm not in (BASELINE, BASELINE_AGAIN)]
