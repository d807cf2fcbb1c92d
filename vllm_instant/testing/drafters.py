"""The contract of a drafter."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_instant.interfaces.drafter import Draft, Drafter, DraftRequest
from vllm_instant.testing.reachable import ContractError, path_to, whole_number

Tokens = npt.NDArray[np.int32]
ENDED = 20
"""Requests that end while a drafter is checked."""


def checked_draft(draft: Any, request: DraftRequest, vocab_size: int) -> list[int]:
    """The token ids of one draft as plain integers.

    Raises:
        ContractError: when the draft is too long, or holds anything but token ids and their confidence.

    """
    tokens = draft.token_ids if isinstance(draft, Draft) else draft
    if tokens is None or isinstance(tokens, str | bytes) or not hasattr(tokens, "__len__"):
        raise ContractError(f"a draft must be a sequence of token ids or a Draft, found {draft!r}")
    plain = list(tokens)
    if len(plain) > request.max_draft_tokens:
        raise ContractError(f"a request with max_draft_tokens = {request.max_draft_tokens} got {len(plain)} tokens")
    for token in plain:
        if not whole_number(token):
            raise ContractError(f"token ids must be integers, found {token!r} of type {type(token).__name__}")
        if not 0 <= token < vocab_size:
            raise ContractError(f"token ids must lie in 0..{vocab_size - 1}, found {token}")
    if isinstance(draft, Draft):
        _check_confidence(list(draft.confidence), len(plain))
    return [int(token) for token in plain]


def check_drafter(
    build: Callable[[], Drafter],
    *,
    vocab_size: int = 200,
    max_draft_tokens: int = 5,
    isolates_cache_salts: bool = True,
    seed: int = 0,
) -> None:
    """Check the contract of a drafter: lengths, types, vocabulary, determinism, untouched inputs, freed state.

    Args:
        build: returns a new drafter; called several times.
        vocab_size: of the texts that the drafter is asked about; at least 50.
        max_draft_tokens: the largest ``max_draft_tokens`` of a request.
        isolates_cache_salts: whether tokens of a request must never be proposed to one with another ``cache_salt``.
        seed: of the texts.

    Raises:
        ContractError: with one sentence.

    """
    # Chance comes from the global generators: the second drafter of the comparison finds them in another state.
    with _global_seed(seed):
        drafter = build()
        drafts = [_answer(drafter, step, vocab_size) for step in _steps(vocab_size, max_draft_tokens, seed)]
    with _global_seed(seed + 1):
        _check_determinism(build, drafts, vocab_size, max_draft_tokens, seed)
    drafter.forget("a request that never was")
    for ended in range(ENDED):
        if path := path_to(drafter, _name(ended)):
            raise ContractError(f"the state of an ended request is kept in {path}: free it in forget()")
    if isolates_cache_salts:
        _check_salts(build(), vocab_size, max_draft_tokens, seed)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed the generators of ``random`` and NumPy, and leave them as they were found."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@dataclass(frozen=True)
class _Step:
    """Requests of one step; then some of them end."""

    requests: tuple[DraftRequest, ...]
    ended: tuple[str, ...] = ()


def _name(number: int) -> str:
    return f"request-{number}-of-the-check"


def _steps(vocab_size: int, max_draft_tokens: int, seed: int) -> Iterator[_Step]:
    """Requests that come, grow and end: repetitive and random texts, batches of one to five, one-token prompts."""
    rng = random.Random(seed)
    running: dict[int, list[int]] = {}
    coming = iter(range(ENDED + 5))
    for _ in range(12 * ENDED):
        if len(running) < 5 and rng.random() < 0.5 and (number := next(coming, None)) is not None:
            running[number] = _text(rng, vocab_size, rng.choice([1, 2, 3, 17, 60]))
        batch = [number for number in running if rng.random() < 0.8]
        for number in batch:
            running[number] += _continuation(rng, running[number], vocab_size)
        requests = tuple(
            DraftRequest(
                _name(number),
                np.array(running[number], np.int32),
                num_prompt_tokens=1,
                max_draft_tokens=rng.randint(1, max_draft_tokens),
                cache_salt=rng.choice(["", "tenant"]) if number % 2 else "",
                is_fixed=number % 3 == 0,
            )
            for number in batch
        )
        ended = [number for number, tokens in running.items() if len(tokens) > 100]
        for number in ended:
            del running[number]
        if requests or ended:
            yield _Step(requests, tuple(map(_name, ended)))
    yield _Step((), tuple(map(_name, range(ENDED + 5))))


def _text(rng: random.Random, vocab_size: int, length: int) -> list[int]:
    """Half of the texts repeat a few tokens, so that lookups find something."""
    repeated = [rng.randrange(vocab_size) for _ in range(4)]
    return [rng.choice(repeated) if length % 2 else rng.randrange(vocab_size) for _ in range(length)]


def _continuation(rng: random.Random, tokens: Sequence[int], vocab_size: int) -> list[int]:
    return [rng.choice(tokens[-30:]) if rng.random() < 0.8 else rng.randrange(vocab_size) for _ in range(3)]


def _answer(drafter: Drafter, step: _Step, vocab_size: int) -> list[list[int]]:
    """Ask a drafter about one step, check its answer, and end what ends."""
    found: list[list[int]] = []
    if step.requests:
        before = [request.token_ids.copy() for request in step.requests]
        requests = list(step.requests)
        answer = drafter.propose(requests)
        if requests != list(step.requests):
            raise ContractError("propose() changed the sequence of requests that it was given")
        if not hasattr(answer, "__len__") or len(answer) != len(requests):
            given = len(answer) if hasattr(answer, "__len__") else repr(answer)
            raise ContractError(f"propose() must return one draft per request: {len(requests)} requests, found {given}")
        for request, tokens in zip(step.requests, before, strict=True):
            if not np.array_equal(request.token_ids, tokens):
                raise ContractError("propose() wrote into token_ids, which is vLLM's own buffer")
        found = [checked_draft(draft, request, vocab_size) for draft, request in zip(answer, requests, strict=True)]
    for request_id in step.ended:
        drafter.forget(request_id)
    return found


def _check_determinism(
    build: Callable[[], Drafter], expected: list[list[list[int]]], vocab_size: int, max_draft_tokens: int, seed: int
) -> None:
    """A second drafter must answer the same, although its buffers are overwritten after every step, as vLLM's are."""
    drafter = build()
    steps = _steps(vocab_size, max_draft_tokens, seed)
    for number, (step, drafts) in enumerate(zip(steps, expected, strict=True)):
        requests = tuple(replace(request, token_ids=request.token_ids.copy()) for request in step.requests)
        if _answer(drafter, _Step(requests, step.ended), vocab_size) != drafts:
            raise ContractError(
                f"two drafters that were asked the same proposed different tokens in step {number}: decide from the "
                "arguments alone, without clocks or random numbers, and keep no view of token_ids"
            )
        for request in requests:
            request.token_ids[:] = 0


def _check_salts(drafter: Drafter, vocab_size: int, max_draft_tokens: int, seed: int) -> None:
    """Tokens that only one tenant has seen must not be proposed to another."""
    secret = set(range(vocab_size // 2, vocab_size))
    rng = random.Random(seed)
    prompt = [rng.randrange(vocab_size // 2) for _ in range(8)]
    answer = [rng.choice(sorted(secret)) for _ in range(40)]
    for end in range(len(prompt), len(prompt) + len(answer)):
        known = np.array((prompt + answer)[:end], np.int32)
        drafter.propose([DraftRequest("theirs", known, len(prompt), max_draft_tokens, cache_salt="theirs")])
    drafter.forget("theirs")
    # The same beginning, so that a shared history would be found; what follows is known to the other tenant alone.
    beginning = [*prompt, *answer[:4]]
    ours = DraftRequest("ours", np.array(beginning, np.int32), len(beginning), max_draft_tokens, cache_salt="ours")
    [draft] = drafter.propose([ours])
    leaked = secret.intersection(checked_draft(draft, ours, vocab_size)) - set(beginning)
    if leaked:
        raise ContractError(f"tokens of a request with one cache_salt were proposed to another: {sorted(leaked)}")


def _check_confidence(confidence: Sequence[Any], length: int) -> None:
    if len(confidence) != length:
        raise ContractError(f"a Draft of {length} tokens must have as many confidences, found {len(confidence)}")
    for value in confidence:
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ContractError(f"confidence must lie in 0..1, found {value!r}")
