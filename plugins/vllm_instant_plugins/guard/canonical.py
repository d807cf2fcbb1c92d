"""Text as rules see it: without case, compatibility forms, accents, invisible characters and look-alike letters.

Every character is mapped by itself, so that a text may arrive in parts, and each canonical character knows where it
came from.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_PLAIN = re.compile(r"[\x20-\x7e]*")
_SPACES = re.compile(r" {2,}")
_ACCENTS = ((0x0300, 0x036F), (0x1AB0, 0x1AFF), (0x1DC0, 0x1DFF), (0x20D0, 0x20FF), (0xFE00, 0xFE0F), (0xFE20, 0xFE2F))
"""Blocks of combining marks. Vowel signs of other scripts are letters in all but name, and remain."""
_FILLERS = frozenset("\u115f\u1160\u3164\uffa0")
"""Letters without a glyph."""


@lru_cache(maxsize=1)
def look_alikes() -> dict[str, str]:
    """Return the ASCII letter or digit for each character that looks like it (Unicode's ``confusables.txt``)."""
    from confusable_homoglyphs.confusables import confusables_data

    found: dict[str, str] = {}
    for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789":
        for twin in confusables_data.get(letter, ()):
            if len(twin["c"]) == 1 and not twin["c"].isascii():
                found.setdefault(twin["c"], letter.lower())
    return found


@lru_cache(maxsize=65536)
def canonical_character(character: str, homoglyphs: bool = True) -> str:
    """Return the canonical form of one character: none, one or several characters."""
    letters = []
    for part in unicodedata.normalize("NFKD", character):
        code = ord(part)
        category = unicodedata.category(part)
        is_invisible = category == "Cf" or part in _FILLERS or 0xE0100 <= code <= 0xE01EF
        if is_invisible or any(first <= code <= last for first, last in _ACCENTS):
            continue
        if part.isspace() or part == "\u2800":
            letters.append(" ")
        elif category != "Cc":
            letters.append(part)
    # Syllables of Hangul are put together again: a part of one is another syllable.
    plain = unicodedata.normalize("NFC", "".join(letters))
    twins = look_alikes() if homoglyphs else {}
    if character in twins:
        return twins[character]
    folded = "".join(twins[letter] if letter in twins else letter.casefold() for letter in plain)
    return "".join(twins.get(letter, letter) for letter in folded)


class Canonical:
    """Maps a text that arrives in parts.

    Args:
        homoglyphs: Whether characters of other scripts that look like ASCII letters are mapped to them.

    """

    def __init__(self, homoglyphs: bool = True) -> None:
        self._homoglyphs = homoglyphs
        self._position = 0
        self._after_space = False

    def add(self, text: str) -> tuple[str, list[int] | range]:
        """Return the canonical characters of the next part, and for each the position of its origin in the text.

        White space of any kind and length becomes one space.
        """
        begin = self._position
        self._position += len(text)
        starts_plain = not (self._after_space and text.startswith(" "))
        if starts_plain and _PLAIN.fullmatch(text) and not _SPACES.search(text):
            if text:
                self._after_space = text.endswith(" ")
            return text.lower(), range(begin, self._position)
        characters: list[str] = []
        origins: list[int] = []
        for offset, character in enumerate(text):
            for letter in canonical_character(character, self._homoglyphs):
                if letter == " " and self._after_space:
                    continue
                self._after_space = letter == " "
                characters.append(letter)
                origins.append(begin + offset)
        return "".join(characters), origins


def canonical(text: str, homoglyphs: bool = True) -> str:
    """Return the canonical form of a whole text."""
    return Canonical(homoglyphs).add(text)[0]
