"""Compiled functions that are compiled once for an installation, where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any], *, fastmath: bool = False) -> Callable[..., Any]:
    """Numba's ``njit``, kept on disk; in containers without any folder to write to, compiled by each process.

    ``fastmath`` lets sums be taken in another order, without which they are not taken several entries at a time.
    """
    try:
        kept: Callable[..., Any] = njit(cache=True, fastmath=fastmath)(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        kept = njit(fastmath=fastmath)(function)
    return kept


def compiled_sums(function: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled`` for loops that mostly add up."""
    return compiled(function, fastmath=True)
