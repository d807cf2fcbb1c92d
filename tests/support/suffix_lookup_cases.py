"""Lookups on the device, and the same by brute force on lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

PROMPT = 2
"""Prompt tokens of an ended request in these cases."""


def looked_up(
    requests: Sequence[Sequence[int]],
    num_sampled: Sequence[int],
    num_drafts: int,
    history: Sequence[tuple[int, Sequence[int]]] = (),
    groups: Sequence[int] | None = None,
    history_tokens: int = 0,
    block: int = 16,
) -> tuple[torch.Tensor, ...]:
    """Drafts of ``requests`` after outputs ``(group, tokens)`` were appended; to be called through ``interpreted``."""
    from vllm_instant_kernels.suffix_lookup import LookupBatch, SuffixLookup

    rows = max(len(requests), 1)
    width = max(map(len, [*requests, *(tokens for _, tokens in history)]), default=1) + PROMPT
    token_ids = torch.zeros(rows, width, dtype=torch.int32)
    num_tokens = torch.zeros(rows, dtype=torch.int32)
    lookup = SuffixLookup(rows, width, num_drafts, history_tokens, "cpu", block)
    for group, tokens in history:
        token_ids[0, : PROMPT + len(tokens)] = torch.tensor([0] * PROMPT + list(tokens))
        num_tokens[0] = PROMPT + len(tokens)
        lookup.append_output(token_ids, num_tokens, 0, PROMPT, width, group)
    token_ids.zero_()
    order = list(reversed(range(rows)))[: len(requests)]
    for row, tokens in zip(order, requests, strict=True):
        token_ids[row, : len(tokens)] = torch.tensor(tokens)
        num_tokens[row] = len(tokens)
    batch = LookupBatch(token_ids, num_tokens, torch.tensor(order), torch.tensor(num_sampled, dtype=torch.int32), width)
    found = lookup.propose(batch, None if groups is None else torch.tensor(groups, dtype=torch.int32))
    return (found.clone(),)


def by_brute_force(
    newest: Sequence[int], tokens: Sequence[int], own: bool, num_drafts: int, candidates: int = 24
) -> tuple[list[int], float]:
    """The draft of a lookup of ``newest`` in ``tokens`` (-1 ends a sequence), and its expected accepted tokens."""
    found: list[tuple[int, int]] = []
    for place in range(len(tokens) - 1, 1, -1):
        length = 0
        while (
            length < min(len(newest), 32)
            and place - 1 - length >= 0
            and tokens[place - 1 - length] == newest[len(newest) - 1 - length]
        ):
            length += 1
        if length >= 2 and len(found) < candidates and (not own or place < len(tokens)):
            found.append((place, length))
    draft: list[int] = []
    survival, expected = 1.0, 0.0
    for position in range(num_drafts):
        found = [(p, n) for p, n in found if p + position < len(tokens) and tokens[p + position] >= 0]
        if not found:
            break
        votes: dict[int, int] = {}
        for place, length in found:
            token = tokens[place + position]
            votes[token] = votes.get(token, 0) + (length + position) ** 2
        chosen = max(votes, key=lambda token: votes[token])  # the first, hence the newest, of equal ones
        total = sum(votes.values())
        found = [(p, n) for p, n in found if tokens[p + position] == chosen]
        longest = max(n for _, n in found) + position
        survival *= votes[chosen] / total * longest / (longest + 2.0)
        expected += survival
        draft.append(chosen)
    return draft, expected


def filled(draft: Sequence[int], newest: int, num_drafts: int) -> list[int]:
    """A draft as the device returns it."""
    return [*draft, *[newest] * (num_drafts - len(draft))]


def launches_of_lookup() -> Any:
    """A lookup in own tokens and in the ring, for ``ahead_of_time.launches``."""
    from vllm_instant_kernels.suffix_lookup import LookupBatch, SuffixLookup

    lookup = SuffixLookup(8, 4096, 16, 100_000, "cpu")
    token_ids, num_tokens = torch.zeros(8, 4096, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    lookup.append_output(token_ids, num_tokens, 3, 10, 20, 0)
    batch = LookupBatch(token_ids, num_tokens, torch.arange(5), torch.ones(5, dtype=torch.int32), 4000)
    return lookup.propose(batch, torch.zeros(5, dtype=torch.int32))
