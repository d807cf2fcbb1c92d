"""Errors in a deployment: one sentence each, collected and shown together, exit code 2."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

EXIT_CODE = 2


@dataclass(frozen=True)
class Problem:
    """One error in a deployment."""

    source: str
    """Where it was written: a file, an environment variable or the command line."""
    key: str
    """The setting, for example ``[speculation] plugin``; empty for the whole source."""
    message: str
    """What is wrong, and what would be valid."""

    def __str__(self) -> str:
        where = f"{self.source}: {self.key}" if self.key else self.source
        return f"{where}: {self.message}"


class DeploymentError(Exception):
    """A deployment that cannot be served, with every problem that was found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def shown(value: Any) -> str:
    """Return a value as it was written, in at most 60 characters."""
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def choices(found: str, valid: Iterable[str]) -> str:
    """Return the valid name nearest to ``found``, if any, and the list of valid names or of similar ones."""
    names = sorted(valid)
    if not names:
        return "nothing can be chosen here"
    nearest = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    is_short = len(names) <= 12
    listed = ", ".join(names if is_short else difflib.get_close_matches(found, names, n=5, cutoff=0.3))
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    if not listed:
        return f"there are {len(names)} valid names, none like it"
    return f"{hint}{'valid' if is_short else 'similar'}: {listed}"
