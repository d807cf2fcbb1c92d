"""The text of a prompt while it is being typed: edits, and how much of it later text cannot change."""

from __future__ import annotations

import unicodedata

MAX_TAIL = 256
"""Characters at the end that are looked at: text without any boundary counts as settled before them."""


class TextError(ValueError):
    """An edit that the text does not allow; the message is for the client."""


class TextBuffer:
    """The text so far. Positions are in characters, that is Unicode code points.

    Args:
        max_characters: how long it may get.

    """

    def __init__(self, max_characters: int) -> None:
        self.text = ""
        self._most = max_characters

    def append(self, text: str) -> None:
        """Add text at the end; raises TextError where it would become too long, and then changes nothing."""
        self.replace(len(self.text), len(self.text), text)

    def replace(self, start: int, end: int | None, text: str) -> None:
        """Put ``text`` in the place of ``start:end``; without ``end`` in that of everything from ``start``.

        Raises:
            TextError: where the positions are not in the text, or the text would become too long.

        """
        length = len(self.text)
        end = length if end is None else end
        if not 0 <= start <= end <= length:
            raise TextError(f"the text has {length} characters: found start {start} and end {end}")
        if length - (end - start) + len(text) > self._most:
            raise TextError(f"a prompt may have {self._most} characters; this would be {length + len(text)}")
        self.text = self.text[:start] + text + self.text[end:]


def settled_length(text: str) -> int:
    """How many characters at the beginning of a text are tokenised the same whatever is added at its end.

    Tokenisers split text at boundaries between words, numbers, spaces and other signs before they merge, and look one
    piece ahead at most; normalisers join a letter with the marks behind it. So everything before the last two pieces
    stays. Text without boundaries (a long line in a script that writes none) counts as settled ``MAX_TAIL``
    characters before its end: nearly always right, and what is read ahead in vain is never used.
    """
    pieces = 0
    kind = ""
    for position in range(len(text) - 1, max(-1, len(text) - 1 - MAX_TAIL), -1):
        found = _kind(text[position])
        if not found or found == kind:
            continue
        pieces += 1
        kind = found
        if pieces == 3:
            return _behind_marks(text, position + 1)
    return max(0, len(text) - MAX_TAIL) if len(text) > MAX_TAIL else 0


def _kind(character: str) -> str:
    """``w`` for letters and digits, ``s`` for space, ``o`` for other signs; empty for what belongs to its neighbour."""
    if character.isspace():
        return "s"
    category = unicodedata.category(character)
    if category[0] == "M" or category == "Cf":
        return ""
    return "w" if category[0] in "LN" else "o"


def _behind_marks(text: str, position: int) -> int:
    """The next position that does not part a character from the marks that belong to it."""
    while position < len(text) and not _kind(text[position]):
        position += 1
    return position


def common_length(one: list[int], other: list[int]) -> int:
    """How many leading entries are equal."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
