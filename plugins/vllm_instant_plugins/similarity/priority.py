"""The order in which waiting requests shall start: cheap bins first, patience running out, prefixes side by side."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_instant_plugins.similarity.request_table import Array, Ledger
from vllm_instant_plugins.similarity.waiting_list import Indices

IMPATIENCE = 1.5
"""What a request costs counts less with this power of the share of its patience that is left: with less the bound is
overstepped by some, with more the short ones lose what they gained (simulated: ``tests/plugins/similarity``)."""
MIN_PATIENCE = 1e-3
"""Seconds."""


def ranked(ledger: Ledger, indices: Indices, now: float, most: int) -> list[int]:
    """Of those requests the first ``most``, in order; among equals those first that stand first in ``indices``.

    ``now`` is the moment that it is the order for, in seconds of the clock of the arrivals.
    """
    cost, arrival, due = ledger.cost[indices], ledger.arrival[indices], ledger.due[indices]
    left = (due - now) / np.maximum(due - arrival, MIN_PATIENCE)
    # Whose patience is at its end go before all others, in the order in which it ended.
    weight = np.where(left > 0, cost * np.abs(left) ** IMPATIENCE, left)
    if most < len(weight):
        first = np.argpartition(weight, most)[:most]
        first.sort()
        indices, weight = indices[first], weight[first]
    order = np.argsort(weight, kind="stable")
    return _beside_their_prefix(ledger, indices[order], int((weight <= 0).sum()))


def _beside_their_prefix(ledger: Ledger, order: Indices, num_due: int) -> list[int]:
    """Put those of the same bin that share a long prefix with one of the first right behind it.

    They read it from the cache then, before it is evicted. Nobody passes the first ``num_due``, whose patience is at
    its end.
    """
    prefix: npt.NDArray[np.int64] = ledger.prefix[order]
    names: list[int] = order.tolist()
    # The last one that is due may be followed by those that are like it.
    alone = max(0, num_due - 1)
    if not prefix[alone:].any():
        return names
    cost: Array = ledger.cost[order]
    together: dict[object, list[int]] = {}
    for place, (name, shared, price) in enumerate(zip(names, prefix.tolist(), cost.tolist(), strict=True)):
        group: object = (shared, price) if shared and place >= alone else (place,)
        together.setdefault(group, []).append(name)
    return [name for group in together.values() for name in group]
