"""Compiled functions that are compiled once for an installation, where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Numba's ``njit``, kept on disk; in containers without any folder to write to, compiled by each process."""
    try:
        kept: Callable[..., Any] = njit(cache=True)(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        kept = njit(function)
    return kept
