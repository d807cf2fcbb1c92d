"""Compiled functions, which are compiled once per installation where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any], *, fastmath: bool = False) -> Callable[..., Any]:
    """Numba's ``njit`` with a cache on disk; in containers without a writable folder, each process compiles.

    ``fastmath`` allows sums in another order, without which they are not vectorized.
    """
    try:
        cached: Callable[..., Any] = njit(cache=True, fastmath=fastmath)(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        cached = njit(fastmath=fastmath)(function)
    return cached


def compiled_sums(function: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled`` for loops that are mostly sums."""
    return compiled(function, fastmath=True)
