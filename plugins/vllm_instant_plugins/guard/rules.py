"""Words, phrases and regular expressions, found across the borders of tokens before any of a match is released."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ahocorasick

from vllm_instant.interfaces.guard import Action, Guard, GuardRequest, Replacement, TextJudge, Verdict
from vllm_instant_plugins.guard.canonical import Canonical, canonical, canonical_character
from vllm_instant_plugins.guard.expressions import Expression, compile_re2


@dataclass(frozen=True)
class Match:
    """A match in canonical text."""

    start: int
    end: int
    rule: str


class RuleSet:
    """All rules of a deployment, compiled once.

    Args:
        words: Words and phrases.
        expressions: Regular expressions.
        whole_words: Whether a word only counts between characters that belong to no word.
        homoglyphs: Whether look-alike letters count as the letters that they look like.
        max_match_characters: Maximum length of a match of an expression.

    Raises:
        ValueError: With one sentence, if a rule is empty or not valid.

    """

    def __init__(
        self,
        words: Sequence[str],
        expressions: Sequence[str] = (),
        *,
        whole_words: bool = True,
        homoglyphs: bool = True,
        max_match_characters: int = 128,
    ) -> None:
        self.homoglyphs = homoglyphs
        self.max_match_characters = max_match_characters
        self._whole_words = whole_words
        self._automaton: Any = ahocorasick.Automaton()
        longest = 0
        for word in words:
            found = canonical(word, homoglyphs).strip()
            if not found:
                raise ValueError(f"the word {word!r} has no visible character")
            self._automaton.add_word(found, (len(found), word))
            longest = max(longest, len(found))
        self._max_word = longest
        if longest:
            self._automaton.make_automaton()
        compiled = [
            Expression(source, lambda letter: canonical_character(letter, homoglyphs)) for source in expressions
        ]
        self._expressions = [(compile_re2(each.whole), each.source) for each in compiled]
        self._search = self._beginning = None
        if compiled:
            self._search = compile_re2("|".join(f"(?:{each.whole})" for each in compiled))
            self._beginning = compile_re2("(?:" + "|".join(each.beginning for each in compiled) + r")\z")
        if not longest and not compiled:
            raise ValueError("there are no rules: name words or patterns")
        # One more character on the left, to see whether a word begins behind it.
        self.num_kept = max(longest, max_match_characters if compiled else 0) + 1

    def first_match(self, text: str, begin: int, is_finished: bool) -> Match | None:
        """Return the match that begins first, at ``begin`` or later.

        A match at the end of a text that continues is none yet: the next character decides whether a word ends there.
        """
        found = self._first_word(text, begin, is_finished)
        if self._search is not None:
            match = self._search.search(text, begin)
            if match is not None and (is_finished or match.end() < len(text)):
                start, end = match.span()
                if found is None or start < found.start:
                    sources = (source for each, source in self._expressions if each.match(text, start) is not None)
                    found = Match(start, end, next(sources, "pattern"))
        return found

    def suspect_from(self, text: str, begin: int) -> int:
        """Return the first position from which the rest of a text may be the beginning of a match."""
        suspect = self._suspect_word(text, begin)
        if self._beginning is not None:
            first = max(begin, len(text) - self.max_match_characters)
            match = self._beginning.search(text, first)
            if match is not None:
                suspect = min(suspect, match.start())
        return suspect

    def _first_word(self, text: str, begin: int, is_finished: bool) -> Match | None:
        best: Match | None = None
        if not self._max_word:
            return None
        for last, (length, word) in self._automaton.iter(text):
            start, end = last - length + 1, last + 1
            if start < begin or (best is not None and start > best.start):
                continue
            if self._whole_words:
                if end == len(text) and not is_finished:
                    continue
                if not _is_whole(text, start, end):
                    continue
            # Of several words at one place the longest counts.
            best = Match(start, end, word)
        return best

    def _suspect_word(self, text: str, begin: int) -> int:
        length = len(text)
        for start in range(max(begin, length - self._max_word), length):
            if self._whole_words and start and _in_word(text[start - 1]) and _in_word(text[start]):
                continue
            if self._automaton.match(text[start:]):  # some word begins with this
                return start
        return length


def _in_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _is_whole(text: str, start: int, end: int) -> bool:
    before = start and _in_word(text[start - 1]) and _in_word(text[start])
    behind = end < len(text) and _in_word(text[end]) and _in_word(text[end - 1])
    return not before and not behind


class Rules(Guard):
    """The guard ``rules``.

    Args:
        rules: What is looked for.
        action: What is done with a match: ``STOP``, ``REPLACE`` or ``ESCALATE``.
        replacement: The text in the place of a match that is replaced.
        min_beginning: Number of characters from which the beginning of a possible match is withheld.

    """

    def __init__(
        self, rules: RuleSet, action: Action = Action.STOP, replacement: str = "***", min_beginning: int = 1
    ) -> None:
        self.rules = rules
        self.action = action
        self.replacement = replacement
        self.min_beginning = min_beginning

    def begin(self, request: GuardRequest) -> TextJudge:
        is_replaced = self.action is Action.REPLACE and request.side == "prompt"
        return RuleJudge(self, Action.STOP if is_replaced else self.action)


class RuleJudge(TextJudge):
    """The search in one text. A prompt cannot be changed, so that a match that would be replaced stops it.

    Args:
        guard: The rules.
        action: What is done with a match.

    """

    def __init__(self, guard: Rules, action: Action) -> None:
        self._guard = guard
        self._rules = guard.rules
        self._action = action
        self._canonical = Canonical(guard.rules.homoglyphs)
        self._text = ""  # the canonical text, without what no match can reach any more
        self._origins: list[int] = []
        self._begin = 0  # matches begin here or later
        self._length = 0
        self._upto = 0
        self._last = Verdict(0)

    def judge(self, text: str, token_ids: Sequence[int], is_finished: bool) -> Verdict:
        if not text and not is_finished:
            return Verdict(self._upto, suspect_from=self._last.suspect_from)
        self._length += len(text)
        letters, origins = self._canonical.add(text)
        self._text += letters
        self._origins.extend(origins)
        replacements: list[Replacement] = []
        rule, first = "", -1
        while (match := self._rules.first_match(self._text, self._begin, is_finished)) is not None:
            start, end = self._origins[match.start], self._origins[match.end - 1] + 1
            if self._action is Action.STOP:
                self._upto = max(self._upto, start)
                return Verdict(self._upto, Action.STOP, rule=match.rule, start=start)
            replacements.append(Replacement(max(start, self._upto), end, self._guard.replacement))
            rule, first = match.rule, start if first < 0 else first
            self._upto = end
            self._begin = match.end
        suspect = len(self._text) if is_finished else self._rules.suspect_from(self._text, self._begin)
        is_held = len(self._text) - suspect >= self._guard.min_beginning
        position = self._origins[suspect] if is_held else self._length
        self._upto = max(self._upto, position)
        self._forget(suspect)
        if self._action is Action.ESCALATE and replacements:
            return Verdict(self._upto, Action.ESCALATE, rule=rule, start=first)
        self._last = Verdict(
            self._upto,
            Action.REPLACE if replacements else Action.PASS,
            suspect_from=self._upto if self._upto < self._length else None,
            replacements=replacements,
            rule=rule,
            start=first,
        )
        return self._last

    def _forget(self, suspect: int) -> None:
        """Keep only what a later match can begin in, and one character before it."""
        self._begin = max(self._begin, min(suspect, len(self._text)))
        surplus = self._begin - 1
        if surplus > self._rules.num_kept:
            self._text = self._text[surplus:]
            del self._origins[:surplus]
            self._begin -= surplus
