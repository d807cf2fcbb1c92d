"""Choices between a lookup and a draft model, step by step, on the device and by plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

NUM_DRAFTS = 3
ACCEPTANCE = 0.7

Step = tuple[Sequence[int], Sequence[int], Sequence[float]]
"""Of all requests: sampled tokens, rejected draft tokens, and accepted tokens that the lookup expects next."""


def chosen_by_kernel(rows: Sequence[int], steps: Sequence[Step], ended: Sequence[tuple[int, int]] = ()) -> tuple[Any]:
    """int64 ``[steps, requests]``: 1 where the lookup is preferred.

    ``ended``: after which step the request of a row ends. To be called through ``interpreted``.
    """
    from vllm_instant_kernels.draft_source import DraftSource

    source = DraftSource(8, NUM_DRAFTS, ACCEPTANCE, "cpu")
    found = []
    for number, (sampled, rejected, expected) in enumerate(steps):
        numbers = [torch.tensor(values, dtype=torch.int32) for values in (sampled, rejected)]
        lookup = torch.tensor(expected, dtype=torch.float32)
        found.append(source.prefers_lookup(torch.tensor(rows), *numbers, lookup).long())
        for after, row in ended:
            if after == number:
                source.forget(row)
    return (torch.stack(found),)


def launches_of_choice() -> Any:
    """One choice for five requests, for ``ahead_of_time.launches``."""
    from vllm_instant_kernels.draft_source import DraftSource

    numbers = torch.zeros(5, dtype=torch.int32)
    source = DraftSource(8, 16, ACCEPTANCE, "cpu")
    return source.prefers_lookup(torch.arange(5), numbers, numbers, torch.zeros(8))
