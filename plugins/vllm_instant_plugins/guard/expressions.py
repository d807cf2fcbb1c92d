"""Regular expressions for a stream: which text matches, and which may still become a match.

Matching is RE2's, whose time is linear in the text whatever the expression. A second expression, made from the first,
matches every beginning of a match: a text whose end it matches must wait for more.
"""

from __future__ import annotations

import re._constants as kinds
import re._parser as parser
from collections.abc import Callable, Sequence
from typing import Any

import re2

MAX_MEMORY = 64 << 20
"""Bytes that RE2 may use per expression."""
_ESCAPED = frozenset("\\.^$|?*+()[]{}-&~#/ ")
_CATEGORIES = {
    kinds.CATEGORY_DIGIT: r"\d",
    kinds.CATEGORY_NOT_DIGIT: r"\D",
    kinds.CATEGORY_SPACE: r"\s",
    kinds.CATEGORY_NOT_SPACE: r"\S",
    kinds.CATEGORY_WORD: r"\w",
    kinds.CATEGORY_NOT_WORD: r"\W",
}
_ANCHORS = {
    kinds.AT_BEGINNING: "^",
    kinds.AT_BEGINNING_STRING: r"\A",
    kinds.AT_BOUNDARY: r"\b",
    kinds.AT_NON_BOUNDARY: r"\B",
    kinds.AT_END: r"\z",
    kinds.AT_END_STRING: r"\z",
}


def compile_re2(expression: str) -> Any:
    """Compile an expression with RE2; raises ValueError, with one sentence, where it is not valid."""
    options = re2.Options()
    options.max_mem = MAX_MEMORY
    options.log_errors = False
    options.case_sensitive = False
    try:
        return re2.compile(expression, options=options)
    except re2.error as error:
        detail = error.args[0] if error.args else "not valid"
        detail = detail.decode() if isinstance(detail, bytes) else detail
        raise ValueError(f"RE2 cannot compile it: {detail}") from None


class Expression:
    """One regular expression in Python's syntax, as far as RE2 has it.

    Args:
        source: The expression.
        canonical: Maps a literal character to its canonical form (``canonical.canonical_character``).

    Raises:
        ValueError: With one sentence, if the expression is not valid or not supported.

    """

    def __init__(self, source: str, canonical: Callable[[str], str]) -> None:
        try:
            tree = list(parser.parse(source))
        except parser.error as error:
            raise ValueError(f"the expression {source!r} is not valid: {error}") from None
        self.source = source
        self._canonical = canonical
        try:
            self.whole = self._sequence(tree)
            self.beginning = self._beginning_of(tree)
            compiled = compile_re2(self.whole)
        except ValueError as error:
            raise ValueError(f"the expression {source!r} is not supported: {error}") from None
        if compiled.search("") is not None:
            raise ValueError(f"the expression {source!r} matches the empty text")

    # ------------------------------------------------------------------------------------- the expression

    def _sequence(self, tree: Sequence[Any]) -> str:
        return "".join(self._item(kind, value) for kind, value in tree)

    def _item(self, kind: Any, value: Any) -> str:
        if kind is kinds.LITERAL:
            return "".join(_escape(letter) for letter in self._canonical(chr(value)))
        if kind is kinds.NOT_LITERAL:
            return f"[^{_escape(chr(value))}]"
        if kind is kinds.ANY:
            return "."
        if kind is kinds.IN:
            return self._set(value)
        if kind is kinds.BRANCH:
            return "(?:" + "|".join(self._sequence(branch) for branch in value[1]) + ")"
        if kind is kinds.SUBPATTERN:
            return f"(?:{self._sequence(value[3])})"
        if kind in (kinds.MAX_REPEAT, kinds.MIN_REPEAT):
            lowest, highest, body = value
            return f"(?:{self._sequence(body)}){_count(lowest, highest)}"
        if kind is kinds.AT and value in _ANCHORS:
            return _ANCHORS[value]
        raise ValueError(f"{str(kind).lower()} has no counterpart in RE2")

    def _set(self, members: Sequence[Any]) -> str:
        parts = []
        for kind, value in members:
            if kind is kinds.NEGATE:
                parts.append("^")
            elif kind is kinds.LITERAL:
                letters = self._canonical(chr(value))
                parts.append(_escape(letters if len(letters) == 1 else chr(value)))
            elif kind is kinds.RANGE:
                parts.append(f"{_escape(chr(value[0]))}-{_escape(chr(value[1]))}")
            elif kind is kinds.CATEGORY:
                parts.append(_CATEGORIES[value])
            else:
                raise ValueError(f"{str(kind).lower()} in a set has no counterpart in RE2")
        return "[" + "".join(parts) + "]"

    # ------------------------------------------------------------------------------------- its beginnings

    def _beginning_of(self, tree: Sequence[Any]) -> str:
        """An expression for all beginnings of a sequence AB…: those of A, or A and a beginning of the rest."""
        if not tree:
            return ""
        kind, value = tree[0]
        first, rest = self._beginning_of_item(kind, value), self._beginning_of(tree[1:])
        if kind is kinds.AT:
            # Whether an anchor holds may depend on text that is still to come.
            return rest
        whole = self._item(kind, value)
        return f"(?:{first}|{whole}{rest})" if rest else first

    def _beginning_of_item(self, kind: Any, value: Any) -> str:
        if kind is kinds.BRANCH:
            return "(?:" + "|".join(self._beginning_of(branch) for branch in value[1]) + ")"
        if kind is kinds.SUBPATTERN:
            return self._beginning_of(value[3])
        if kind in (kinds.MAX_REPEAT, kinds.MIN_REPEAT):
            _, highest, body = value
            before = "*" if highest is kinds.MAXREPEAT else f"{{0,{max(0, highest - 1)}}}"
            return f"(?:{self._sequence(body)}){before}(?:{self._beginning_of(body)})?"
        return f"(?:{self._item(kind, value)})?"


def _count(lowest: int, highest: Any) -> str:
    return f"{{{lowest},}}" if highest is kinds.MAXREPEAT else f"{{{lowest},{highest}}}"


def _escape(letter: str) -> str:
    if letter in _ESCAPED:
        return f"\\{letter}"
    return letter if letter.isprintable() else f"\\x{{{ord(letter):x}}}"
