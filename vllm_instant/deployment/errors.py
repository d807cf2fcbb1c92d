"""Errors that a user can act on: one sentence each, collected and shown together, exit code 2."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

EXIT_CODE = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    ``source`` says where it was written (a file, an environment variable, the command line), ``key`` which setting it
    concerns (``[speculation] plugin``; empty for the whole source), ``message`` what is wrong and what would be right.
    """

    source: str
    key: str
    message: str

    def __str__(self) -> str:
        where = f"{self.source}: {self.key}" if self.key else self.source
        return f"{where}: {self.message}"


class DeploymentError(Exception):
    """A deployment that cannot be served; carries every problem that was found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def shown(value: Any) -> str:
    """A value as its writer would recognise it, in one short line."""
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def choices(found: str, valid: Iterable[str]) -> str:
    """What could have been meant: the nearest valid name if there is one, and the whole list."""
    names = sorted(valid)
    if not names:
        return "nothing can be chosen here"
    nearest = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    listed = (
        ", ".join(names) if len(names) <= 12 else ", ".join(difflib.get_close_matches(found, names, n=5, cutoff=0.3))
    )
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    if not listed:
        return f"there are {len(names)} valid names, none like it"
    return f"{hint}valid: {listed}" if len(names) <= 12 else f"{hint}similar: {listed}"
