"""Traces whose structure is known: planted clusters, or none."""

from __future__ import annotations

import numpy as np

from vllm_instant.moe.routing_trace import RoutedModel, Trace


def planted(
    experts: int = 32,
    groups: int = 4,
    top_k: int = 4,
    layers: int = 2,
    requests: int = 40,
    tokens: int = 40,
    loyalty: float = 0.8,
    seed: int = 0,
) -> tuple[Trace, np.ndarray]:
    """Tokens choose most of their experts from one group of experts; the groups are scattered over the numbers.

    Requests of class ``even`` like the first half of the groups, those of class ``odd`` the second half.

    Args:
        loyalty: the share of choices that stay in the group; ``1 / groups`` is no structure at all.

    Returns:
        The trace, and the group of each expert ``[layers, experts]``.

    """
    generator = np.random.default_rng(seed)
    group_of = np.stack([generator.permuted(np.arange(experts) % groups) for _ in range(layers)])
    rows = requests * tokens
    request = np.repeat(np.arange(requests, dtype=np.int32), tokens)
    own = generator.integers(0, groups // 2, rows) + (request % 2) * (groups // 2)
    chosen = np.empty((rows, layers, top_k), np.int16)
    inside = loyalty / (experts // groups)
    outside = (1 - loyalty) / (experts - experts // groups)
    for layer in range(layers):
        odds = np.where(group_of[layer][None] == own[:, None], inside, outside)
        # The largest of independent Gumbel variables are a draw without putting back.
        keys = np.log(odds) + generator.gumbel(size=odds.shape)
        chosen[:, layer] = np.argsort(-keys, 1)[:, :top_k]
    trace = Trace(
        RoutedModel("planted", layers, experts, top_k),
        chosen,
        np.full(chosen.shape, 1 / top_k, np.float16),
        request,
        np.tile(np.arange(tokens, dtype=np.int64), requests),
        np.zeros(rows, bool),
        (np.arange(requests) % 2).astype(np.int16),
        ("even", "odd"),
    )
    return trace, group_of
