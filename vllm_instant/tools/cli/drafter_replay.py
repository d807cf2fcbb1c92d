"""Replays of texts: which draft tokens a drafter would have had accepted, without an engine and without vLLM.

A text is generated again token by token, as a greedy server would that answers with exactly this text: a draft token is
accepted where it is the text's next token, and every step yields the accepted tokens and one more.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant.interfaces.drafter import Drafter, DraftRequest
from vllm_instant.testing import ContractError, checked_draft

Tokens = npt.NDArray[np.int32]
PIECE = 2048
"""Tokens of plain text that are replayed as one request; the first quarter is its prompt."""


class TextError(ValueError):
    """A text that cannot be replayed; the message is one sentence."""


@dataclass(frozen=True)
class ReplayedRequest:
    """One request of a replay: its prompt, and the answer that is generated again."""

    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass
class Replay:
    """What became of a drafter's tokens."""

    accepted_by_position: list[int]
    """Steps in which the draft token of each position was accepted."""
    steps: int = 0
    drafted: int = 0
    generated: int = 0
    """Tokens of all answers."""
    step_seconds: list[float] = field(default_factory=list)
    """Time spent in the drafter, by step."""

    @property
    def accepted_per_step(self) -> float:
        """Accepted draft tokens per step."""
        return sum(self.accepted_by_position) / self.steps

    def count(self, draft: Sequence[int], following: Sequence[int]) -> int:
        """Count the leading draft tokens that the text has, too; returns how many."""
        accepted = 0
        for token, expected in zip(draft, following, strict=False):
            if token != expected:
                break
            self.accepted_by_position[accepted] += 1
            accepted += 1
        self.steps += 1
        self.drafted += len(draft)
        return accepted


def replay(
    build: Callable[[], Drafter], requests: Sequence[ReplayedRequest], max_draft_tokens: int, vocab_size: int
) -> Replay:
    """Generate the answers of all requests, one after the other, with a new drafter.

    Raises:
        ContractError: where the drafter returns anything but drafts.

    """
    drafter = build()
    # Compilers run at the first call, which is not a step's time.
    tokens = np.array([*requests[0].prompt, *requests[0].answer], np.int32)
    drafter.propose([DraftRequest("warm-up", tokens, len(requests[0].prompt), max_draft_tokens)])
    drafter.forget("warm-up")
    drafter = build()
    found = Replay([0] * max_draft_tokens)
    for number, request in enumerate(requests):
        tokens = np.array([*request.prompt, *request.answer], np.int32)
        # A server samples the first token of an answer before the drafter is asked.
        end = len(request.prompt) + 1
        while end < len(tokens):
            asked = DraftRequest(str(number), tokens[:end], len(request.prompt), max_draft_tokens)
            started = time.perf_counter()
            answer = drafter.propose([asked])
            found.step_seconds.append(time.perf_counter() - started)
            if len(answer) != 1:
                raise ContractError(f"propose() must return one draft per request: 1 request, found {len(answer)}")
            end += found.count(checked_draft(answer[0], asked, vocab_size), tokens[end:].tolist()) + 1
        drafter.forget(str(number))
        found.generated += len(request.answer)
    return found


class NgramLookup(Drafter):
    """vLLM's ``ngram`` drafter for replays: what followed the earliest occurrence of the longest run of new tokens."""

    def __init__(self, shortest: int = 2, longest: int = 4) -> None:
        self.shortest = shortest
        self.longest = longest

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """See ``Drafter.propose``."""
        return [self._following(request.token_ids, request.max_draft_tokens) for request in requests]

    def _following(self, tokens: Tokens, length: int) -> list[int]:
        # The last token is left out: an occurrence at the very end is the run itself, which nothing follows yet.
        known, size_of_token = tokens[:-1].tobytes(), tokens.itemsize
        for size in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            run = tokens[-size:].tobytes()
            place = known.find(run)
            while place % size_of_token and place >= 0:
                place = known.find(run, place + 1)
            if place >= 0:
                start = place // size_of_token + size
                return [int(token) for token in tokens[start : start + length]]
        return []


_WORDS = re.compile(r" ?\w+|\s|[^\w\s]")


def word_tokenizer() -> Callable[[str], list[int]]:
    """Tokens are words with the space before them, marks and line ends; ids in the order in which they first occur."""
    vocabulary: dict[str, int] = {}
    return lambda text: [vocabulary.setdefault(word, len(vocabulary)) for word in _WORDS.findall(text)]


def read_requests(path: Path, encode: Callable[[str], list[int]]) -> list[ReplayedRequest]:
    """The requests of a text file, or of a ``.jsonl`` file with a conversation per line.

    Raises:
        TextError: when the file cannot be read or has nothing to generate.

    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read: {error}") from None
    if path.suffix == ".jsonl":
        pairs = [pair for number, line in enumerate(text.splitlines(), 1) for pair in _turns(path, number, line)]
        requests = [ReplayedRequest(encode(prompt), encode(answer)) for prompt, answer in pairs]
    else:
        requests = list(_pieces(encode(text)))
    requests = [request for request in requests if request.prompt and len(request.answer) > 1]
    if not requests:
        raise TextError(f"{path} has no answer of two tokens or more to replay")
    return requests


def _pieces(tokens: list[int]) -> Iterator[ReplayedRequest]:
    for start in range(0, len(tokens), PIECE):
        piece = tokens[start : start + PIECE]
        yield ReplayedRequest(piece[: len(piece) // 4], piece[len(piece) // 4 :])


def _turns(path: Path, number: int, line: str) -> Iterable[tuple[str, str]]:
    """Prompt and answer of each assistant turn of a line's conversation, or of its prompt with its completion."""
    if not line.strip():
        return []
    try:
        given = json.loads(line)
        if "messages" in given:
            return _assistant_turns(given["messages"])
        answer = next(given[key] for key in ("completion", "response", "answer", "output") if key in given)
        return [(str(given["prompt"]), str(answer))]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise TextError(
            f'{path} line {number} should be {{"messages": [{{"role": …, "content": …}}, …]}} or '
            '{"prompt": …, "completion": …}'
        ) from None


def _assistant_turns(messages: Sequence[Any]) -> list[tuple[str, str]]:
    found, before = [], ""
    for message in messages:
        said = f"{message['role']}: {message['content']}\n"
        if message["role"] == "assistant":
            found.append((f"{before}assistant: ", f"{message['content']}\n"))
        before += said
    return found
