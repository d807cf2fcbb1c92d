"""What of one answer may be released: a state machine without clock, plugin or engine.

Positions are characters of the answer's text. A token belongs to a release if all its text does, and only a stop
cuts inside of a token, so that texts, token ids and log probabilities end at the same place.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_instant.interfaces.guard import Action, Late, Replacement, Verdict

STRUCTURE = frozenset('{}[]<>":,\\')
"""Characters of JSON and of tool calls: a span with one of them is stopped, not replaced."""
LATE_RULE = "late"
"""The rule of an answer that was stopped because a verdict did not come in time."""
FAILED_RULE = "failed"
"""The rule of an answer that was stopped because its guard has failed."""


@dataclass(frozen=True)
class Limits:
    """How long text may be withheld, and how much may be released without a verdict."""

    late: Late
    hold_tokens: int
    hold_seconds: float
    max_wait_seconds: float


@dataclass(frozen=True)
class Release:
    """The next part of an answer for the client."""

    text: str
    tokens: Sequence[int]
    """Indices of the released tokens in the answer."""
    num_unjudged: int = 0
    """Number of tokens among them that were released without a verdict."""
    delay: float = 0.0
    """Seconds for which the oldest of them was withheld."""
    is_final: bool = False
    is_stopped: bool = False
    """Whether the guard ended the answer here."""
    rule: str = ""
    """The rule for which it did."""


@dataclass
class _Token:
    index: int
    start: int
    end: int
    arrived: float


class Window:
    """The withheld end of one answer.

    Args:
        limits: The deployment's limits, or stricter ones of the request.
        is_streamed: Whether the client gets parts; otherwise nothing is late before the answer is finished.
        is_structured: Whether replacements would break the answer, so that they stop it.
        waits_for_prompt: Whether nothing may be released before ``prompt_passed``.

    """

    def __init__(
        self, limits: Limits, is_streamed: bool = True, is_structured: bool = False, waits_for_prompt: bool = False
    ) -> None:
        self._limits = limits
        self._is_streamed = is_streamed
        self._is_structured = is_structured
        self._waits_for_prompt = waits_for_prompt
        self._text = ""  # from self._released on
        self._length = 0
        self._released = 0
        self._judged = 0
        self._suspect_from: int | None = None
        self._stop_at: int | None = None
        self._rule = ""
        self._failed = False
        self._replacements: deque[Replacement] = deque()
        self._replaced: list[Replacement] = []  # spans that may overlap a token that is not released
        # Tokens that are not released, or released ahead of the verdicts.
        self._tokens: deque[_Token] = deque()
        self._num_released_ahead = 0
        self._num_tokens = 0
        self._last_end = 0
        self._finished_at: float | None = None
        self.has_ended = False

    @property
    def num_withheld(self) -> int:
        """Number of characters that are not released."""
        return self._length - self._released

    @property
    def is_stopping(self) -> bool:
        """Whether the guard has ended the answer, or will at the next ``take``."""
        return self._stop_at is not None

    def extend(self, text: str, ends: Sequence[int], now: float) -> None:
        """Add generated text, and the positions at which the new tokens end, in order."""
        self._text += text
        self._length += len(text)
        for end in ends:
            self._tokens.append(_Token(self._num_tokens, self._last_end, end, now))
            self._num_tokens += 1
            self._last_end = end

    def finish(self, now: float) -> None:
        """The engine generates no more text."""
        if self._finished_at is None:
            self._finished_at = now

    def prompt_passed(self) -> None:
        """The prompt was judged, and the answer may begin."""
        self._waits_for_prompt = False

    def abort(self, now: float) -> Release:
        """End the answer with what was judged, because its client or the engine ended it."""
        self.has_ended = True
        return self._cut(max(self._released, self._passed()), now, is_stopped=True)

    def fail(self) -> None:
        """No verdicts will come any longer."""
        self._failed = True

    def stop(self, position: int, rule: str) -> None:
        """End the answer at a position, or at the end of what was released behind it."""
        if self._stop_at is None or position < self._stop_at:
            self._stop_at, self._rule = position, rule

    def apply(self, verdict: Verdict) -> None:
        """Take over a verdict. An earlier stop remains, and a position never decreases."""
        upto = min(verdict.upto, self._length)
        for replacement in verdict.replacements:
            if not self._replace(replacement, verdict.rule):
                return
        if verdict.action is Action.ESCALATE:
            self.stop(max(self._judged, min(verdict.start, upto)), verdict.rule)
            return
        self._judged = max(self._judged, upto)
        self._suspect_from = verdict.suspect_from
        if verdict.action is Action.STOP:
            self.stop(upto, verdict.rule)

    def _replace(self, replacement: Replacement, rule: str) -> bool:
        start = max(replacement.start, self._released)
        span = self._text[start - self._released : replacement.end - self._released]
        if self._is_structured or not STRUCTURE.isdisjoint(span):
            self._judged = max(self._judged, replacement.start)
            self.stop(replacement.start, rule)
            return False
        self._replacements.append(replacement)
        return True

    def take(self, now: float) -> Release | None:
        """Return what may be released now; None for nothing new."""
        if self.has_ended:
            return None
        limit = self._limit(now)
        if self._stop_at is not None:
            self.has_ended = True
            end = self._released if self._waits_for_prompt else max(self._released, min(self._stop_at, self._length))
            return self._cut(end, now, is_stopped=True)
        if not self._is_streamed and self._finished_at is None:
            return None
        if self._finished_at is not None and limit >= self._length and not self._blocks_end(now):
            self.has_ended = True
            return self._cut(self._length, now)
        limit = self._end_of_a_token(limit)
        if limit <= self._released:
            return None
        return self._cut(limit, now)

    def deadline(self) -> float | None:
        """Return the time at which ``take`` may return something without any other event; None for never."""
        if self.has_ended or not self._has_unjudged() or (oldest := self._oldest()) is None:
            return None
        if self._limits.late is Late.WAIT:
            return oldest + self._limits.max_wait_seconds
        if self._limits.late is Late.STOP:
            return oldest + self._limits.hold_seconds
        for token in self._ahead():
            if token.end > self._released:
                return self._arrival(token) + self._limits.hold_seconds
        if self._length == self._released and self._finished_at is not None:
            return self._finished_at + self._limits.hold_seconds
        return oldest + self._limits.max_wait_seconds

    # ------------------------------------------------------------------------------------------- how far

    def _limit(self, now: float) -> int:
        """Return the position up to which text may be released, and stop the answer where it is too late."""
        judged = self._passed()
        if self._failed:
            if self._limits.late is Late.RELEASE:
                self._waits_for_prompt = False
                return self._length
            if self._finished_at is None or self._waits_for_prompt or judged < self._length:
                self.stop(judged, FAILED_RULE)
        oldest = self._oldest()
        if self._stop_at is not None or oldest is None or not self._has_unjudged():
            return judged
        patience = self._limits.hold_seconds if self._limits.late is Late.STOP else self._limits.max_wait_seconds
        if now >= oldest + patience:
            self.stop(judged, LATE_RULE)
        if self._limits.late is Late.RELEASE:
            for token in self._ahead():
                if now < self._arrival(token) + self._limits.hold_seconds:
                    break
                judged = token.end
        return judged

    def _passed(self) -> int:
        return 0 if self._waits_for_prompt else self._judged

    def _barrier(self) -> int:
        """The position from which late text must wait nevertheless, because more text decides about it."""
        return self._length if self._suspect_from is None else min(self._suspect_from, self._length)

    def _has_unjudged(self) -> bool:
        return self._waits_for_prompt or self._barrier() > self._judged

    def _blocks_end(self, now: float) -> bool:
        """Whether an answer whose text may be released must wait for the judgment of its prompt."""
        if not self._waits_for_prompt or self._finished_at is None:
            return False
        return self._limits.late is not Late.RELEASE or now < self._finished_at + self._limits.hold_seconds

    def _arrival(self, token: _Token) -> float:
        """When a token could have reached the client, were there no guard; infinite before a whole answer's end."""
        if self._is_streamed:
            return token.arrived
        return math.inf if self._finished_at is None else max(token.arrived, self._finished_at)

    def _oldest(self) -> float | None:
        """Since when the oldest text without a verdict is withheld; None while none is."""
        if not self._is_streamed and self._finished_at is None:
            return None
        passed = self._passed()
        for token in self._tokens:
            if token.end > passed:
                return self._arrival(token)
        return self._finished_at

    def _ahead(self) -> list[_Token]:
        """The tokens without a verdict that may be released once they are late."""
        if not self._is_streamed and self._finished_at is None:
            return []
        passed, barrier = self._passed(), self._barrier()
        found: list[_Token] = []
        for token in self._tokens:
            if token.end <= passed:
                continue
            if token.end > barrier or len(found) >= self._limits.hold_tokens:
                break
            found.append(token)
        return found

    # ------------------------------------------------------------------------------------------- the cut

    def _cut(self, limit: int, now: float, is_stopped: bool = False) -> Release:
        text = self._text_up_to(limit)
        is_last = self.has_ended and not is_stopped
        count, unjudged, oldest = self._num_released_ahead, 0, now
        tokens: list[int] = []
        passed = self._passed()
        complete = self._num_complete(limit, is_last)
        for token in list(self._tokens)[count:complete]:
            oldest = min(oldest, self._arrival(token))
            unjudged += token.end > passed
            if not any(token.start < span.end and token.end > span.start for span in self._replaced):
                tokens.append(token.index)
        if complete < len(self._tokens):
            self._replaced = [span for span in self._replaced if span.end > self._tokens[complete].start]
        self._num_released_ahead = max(count, complete)
        # Only tokens ahead of the verdicts count against ``hold_tokens``; the others are forgotten.
        while self._num_released_ahead and self._tokens[0].end <= passed:
            self._tokens.popleft()
            self._num_released_ahead -= 1
        return Release(
            text, tokens, unjudged, max(0.0, now - oldest), self.has_ended, is_stopped, self._rule if is_stopped else ""
        )

    def _end_of_a_token(self, limit: int) -> int:
        """The last end of a token up to ``limit``: parsers of tool calls and reasoning want texts with their tokens."""
        found = 0
        for token in self._tokens:
            if token.end > limit:
                break
            found = token.end
        return found

    def _num_complete(self, limit: int, is_last: bool) -> int:
        """The number of leading tokens whose text ends at or before ``limit``.

        Tokens at the end without text may be the first bytes of a character that is withheld; they wait for it.
        """
        if is_last:
            return len(self._tokens)
        with_text = 0
        for number, token in enumerate(self._tokens, start=1):
            if token.end > limit:
                break
            if token.end > token.start:
                with_text = number
        return max(with_text, self._num_released_ahead)

    def _text_up_to(self, limit: int) -> str:
        pieces: list[str] = []
        position = self._released
        while self._replacements and self._replacements[0].start < limit:
            span = self._replacements.popleft()
            if span.end <= position:
                continue
            if span.start >= position:
                pieces.append(self._text[position - self._released : span.start - self._released])
            pieces.append(span.text)
            self._replaced.append(span)
            position = span.end
        if limit > position:
            pieces.append(self._text[position - self._released : limit - self._released])
            position = limit
        self._text = self._text[position - self._released :]
        self._released = max(self._released, position)
        return "".join(pieces)
