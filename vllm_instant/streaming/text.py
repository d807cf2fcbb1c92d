"""The text of a prompt while it is being typed: edits, and the prefix that later text cannot change."""

from __future__ import annotations

import unicodedata

MAX_TAIL = 256
"""Number of characters at the end in which boundaries are searched; text before them counts as stable."""


class TextError(ValueError):
    """An edit that is not possible, with a message for the client."""


class TextBuffer:
    """The text so far, with positions in characters (Unicode code points).

    Args:
        max_characters: Maximum length.

    """

    def __init__(self, max_characters: int) -> None:
        self.text = ""
        self._max_characters = max_characters

    def append(self, text: str) -> None:
        """Add text at the end; raises ``TextError`` and changes nothing if the result is too long."""
        self.replace(len(self.text), len(self.text), text)

    def replace(self, start: int, end: int | None, text: str) -> None:
        """Replace the characters ``start:end`` by ``text``; without ``end``, all from ``start``.

        Raises:
            TextError: The positions are outside the text, or the result is too long.

        """
        length = len(self.text)
        end = length if end is None else end
        if not 0 <= start <= end <= length:
            raise TextError(f"the text has {length} characters: found start {start} and end {end}")
        if length - (end - start) + len(text) > self._max_characters:
            raise TextError(
                f"a prompt has at most {self._max_characters} characters; this one would have {length + len(text)}"
            )
        self.text = self.text[:start] + text + self.text[end:]


def stable_prefix_length(text: str) -> int:
    """Return the number of leading characters whose tokens do not depend on text that is added at the end.

    Tokenizers split text at boundaries between words, numbers, spaces and other characters before they merge, and look
    at most one piece ahead; normalizers combine a letter with the marks after it. So everything before the last two
    pieces is stable. In text without boundaries (a long line in a script without spaces) all but the last ``MAX_TAIL``
    characters count as stable. That is almost always right, and where it is wrong the prefilled tokens are not used.
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
    """``w`` for letters and digits, ``s`` for space, ``o`` for others; empty for marks and format characters."""
    if character.isspace():
        return "s"
    category = unicodedata.category(character)
    if category[0] == "M" or category == "Cf":
        return ""
    return "w" if category[0] in "LN" else "o"


def _behind_marks(text: str, position: int) -> int:
    """The next position that does not separate a character from its marks."""
    while position < len(text) and not _kind(text[position]):
        position += 1
    return position


def common_length(one: list[int], other: list[int]) -> int:
    """Return the number of equal leading entries."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
