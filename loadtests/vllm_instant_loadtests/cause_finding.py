"""A cause of a spike with its score and its evidence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CauseFinding:
    """One cause with its score and its evidence."""

    cause: str
    score: float
    evidence: list[str]
