"""Requests for ``scheduling.py``: when they are due, how long their answers are, and their prompts.

Answers end at a length that no policy can read from the request: ``min_tokens`` suppresses the end token until then,
and a logit bias forces it then. System prompt and question tell the kind of answer, as in real traffic. Prompts have
some 150 tokens and a fifth of the answers about 192, the others 12; in the ``chat`` traffics prompts have some 50, a
fifth of the answers about 600, and the others 8.

The ``assistant`` traffics are different: prompts are conversations, tool questions, mails whose facts are wanted,
explanations and stories of ``prompt_sets``, and answers end where the model ends them (at 200 tokens at the latest). No
length is known beforehand, hence the arms that need one are left out there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_instant.tools.demo import prompt_sets
from vllm_instant.tools.measure.prompts import snippets


@dataclass(frozen=True)
class Mix:
    """Lengths of answers and prompts."""

    short: int = 12
    """Tokens of most answers, about."""
    long: int = 192
    """Of the others."""
    long_share: float = 0.2
    log_normal: bool = False
    """Instead: lengths of all sizes."""
    head_lines: int = 6
    """How often a prompt says what kind of answer is wanted."""
    question: int | None = None
    """Characters of what follows, all of them by default."""
    limit: int = 720
    """``max_tokens``, the same for all answers, so that it predicts no length."""

    def lengths(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Output lengths, in tokens."""
        if self.log_normal:
            return np.clip(random.lognormal(np.log(24), 1.2, count), 4, 700).astype(int)
        is_long = np.zeros(count, bool)
        is_long[random.choice(count, round(self.long_share * count), replace=False)] = True
        spread = random.uniform(0.6, 1.4, count)
        return np.maximum(2, np.where(is_long, self.long, self.short) * spread).astype(int)


DOCUMENTS = Mix()
CHAT = Mix(short=8, long=600, head_lines=2, question=40, limit=860)
ASSISTANT = Mix(limit=200)
SETS = ("conversation", "tools", "extract", "explain", "story")
LONG_SETS = ("explain", "story")
"""Whose answers are long, for the figures by kind."""
TRAFFIC: dict[str, tuple[Mix, float | None]] = {
    "burst": (DOCUMENTS, None),
    **{load: (DOCUMENTS, float(load)) for load in ("0.7", "0.9", "1.1")},
    "heavy": (Mix(log_normal=True), 1.1),
    "adversarial": (Mix(long_share=0.04), 1.2),
    "chat burst": (CHAT, None),
    **{f"chat {load}": (CHAT, float(load)) for load in ("0.7", "0.9", "1.1", "1.5")},
    "assistant burst": (ASSISTANT, None),
    "assistant 0.9": (ASSISTANT, 0.9),
}
"""The mix of requests, and the load as a share of the capacity; None is a burst."""


@dataclass(frozen=True)
class Speed:
    """What the server can do, from a burst."""

    tokens_per_second: float = 1.0
    tokens_per_request: float = 1.0


@dataclass(frozen=True)
class PlannedRequest:
    """A request of a traffic: when, how long, and its prompt."""

    at: float
    tokens: int | None
    """Length of the answer; None where the model ends it."""
    prompt: str
    kind: str
    limit: int


def arrivals(load: float | None, count: int, seconds: float, random: np.random.Generator) -> np.ndarray:
    """When requests are due; ``seconds`` is the time that the server needs for one at full load."""
    if load is None:
        return np.sort(random.uniform(0, 0.2, count))
    return np.cumsum(random.exponential(seconds / load, count))


def requests_to_an_assistant(load: float | None, count: int, seconds: float, seed: int) -> list[PlannedRequest]:
    """One round's requests of the ``assistant`` traffics: every set equally often, in random order."""
    random = np.random.default_rng(seed)
    each = -(-count // len(SETS))
    asked = [(name, p["prompt"]) for name in SETS for p in prompt_sets.PROMPT_SETS[name].prompts(each, seed)]
    order = random.permutation(len(asked))[:count]
    due = arrivals(load, count, seconds, random)
    chosen = [(asked[place], float(at)) for place, at in zip(order, due, strict=True)]
    return [
        PlannedRequest(at, None, prompt, "long" if name in LONG_SETS else "short", ASSISTANT.limit)
        for (name, prompt), at in chosen
    ]


def requests_of(mix: Mix, load: float | None, count: int, speed: Speed, seed: int) -> list[PlannedRequest]:
    """One round's requests."""
    if mix is ASSISTANT:
        return requests_to_an_assistant(load, count, speed.tokens_per_request / speed.tokens_per_second, seed)
    random = np.random.default_rng(seed)
    tokens = mix.lengths(count, random)
    at = arrivals(load, count, tokens.mean() / speed.tokens_per_second, random)
    texts = snippets("structured", 0.0, count, seed)
    made = []
    for number in range(count):
        slow = tokens[number] > 4 * mix.short
        # The system prompts are long enough to be told apart, and different from the first tokens on.
        wanted = "Quick answer, in a word or two only, yes?"
        if slow:
            wanted = "Report: write out every step in full, with all reasons and sources."
        line = f"{wanted}\n"
        question = texts[number % len(texts)].text[: mix.question]
        prompt = f"{line * mix.head_lines}{number} {question}"
        made.append(
            PlannedRequest(float(at[number]), int(tokens[number]), prompt, "long" if slow else "short", mix.limit)
        )
    return made


def prompts_of(mix: Mix) -> str:
    """The prompts in words, with source and licence."""
    if mix is not ASSISTANT:
        return "records of the Python standard library (PSF-2.0), lengths of answers forced"
    return f"{', '.join(SETS)} ({prompt_sets.OWN}, Apache-2.0)"
