"""Lookups on the device, and the same on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_instant_plugins.suffix.calibration import ConfidenceCalibrator
from vllm_instant_plugins.suffix.index import TokenIndex
from vllm_instant_plugins.suffix.request_lookup import RequestLookup

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
    """Drafts of ``requests`` after outputs ``(group, tokens)`` were appended, and the expected accepted tokens of each.

    To be called through ``interpreted``.
    """
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
    return found.clone(), lookup.expected[:rows].clone()


def streamed(
    requests: Sequence[Sequence[int]], lengths: Sequence[int], num_drafts: int, block: int = 16
) -> tuple[torch.Tensor, ...]:
    """Drafts after each of ``lengths`` tokens of every request, int64 ``[steps, requests, num_drafts]``."""
    from vllm_instant_kernels.suffix_lookup import LookupBatch, SuffixLookup

    rows, width = len(requests), max(map(len, requests))
    lookup = SuffixLookup(rows, width, num_drafts, 0, "cpu", block)
    token_ids, num_tokens = torch.zeros(rows, width, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    found = []
    for length in lengths:
        for row, tokens in enumerate(requests):
            token_ids[row, :length] = torch.tensor(tokens[:length])
        num_tokens.fill_(length)
        batch = LookupBatch(token_ids, num_tokens, torch.arange(rows), torch.ones(rows, dtype=torch.int32), width)
        found.append(lookup.propose(batch).clone())
    return (torch.stack(found),)


def streamed_on_host(tokens: Sequence[int], lengths: Sequence[int], num_drafts: int) -> list[list[int]]:
    """The drafts of the lookup on the host after each of ``lengths`` tokens."""
    lookup, calibrator = RequestLookup(len(tokens)), ConfidenceCalibrator()
    stream = np.array(tokens, np.int32)
    stream.flags.writeable = False
    return [list(lookup.propose(stream[:length], num_drafts, calibrator).token_ids) for length in lengths]


def on_host(
    tokens: Sequence[int],
    num_drafts: int,
    history: Sequence[tuple[int, Sequence[int]]] = (),
    group: int = -1,
    history_tokens: int = 1,
) -> list[int]:
    """The draft of the lookup on the host, after outputs ``(group, tokens)`` were appended."""
    shared = TokenIndex(max(history_tokens, 1))
    for of_group, output in history:
        if output:
            shared.append(np.array(output, np.int32), of_group)
            shared.end_sequence(of_group)
    newest = np.array(tokens, np.int32)
    newest.flags.writeable = False
    lookup = RequestLookup(len(tokens))
    return list(lookup.propose(newest, num_drafts, ConfidenceCalibrator(), shared, group).token_ids)


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
