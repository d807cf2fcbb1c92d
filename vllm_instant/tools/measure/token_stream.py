"""One streamed answer, measured by token.

With speculative decoding one server-sent event carries several tokens: counting events would make a server look several
times slower or faster than it is. vLLM reports the number of tokens so far with every event when asked
(``continuous_usage_stats``), and that number is what is counted here.

``TokenStream`` reads bytes and knows no HTTP library, so that all clients count alike: ``streaming_client`` (httpx) for
one process with few streams, and the load generator's (geventhttpclient under Locust), which follows thousands of
streams. Parsing every event as JSON would keep a load generator busy with a hundred streams; here one regular
expression finds the last token count in everything that the socket had.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

STREAM_OPTIONS = {"include_usage": True, "continuous_usage_stats": True}
"""Ask vLLM to report the number of tokens so far with every event."""
MERGE_SECONDS = 0.001
"""Arrivals closer than this count as one: a client that lags behind reads several waiting events at once."""
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d+)')
_ACCEPTED = re.compile(rb'"num_accepted_draft_tokens":\s*(\d+)')
_ID = re.compile(rb'"id":\s*"([^"]+)"')
_TEXT = re.compile(rb'"(?:content|text)":\s*"(?!")')
_THINKING = re.compile(rb'"(?:reasoning_content|reasoning)":\s*"(?!")')
_ERROR = re.compile(rb'data: \{"error":\s*(.*)')


class StreamError(Exception):
    """A request failed; the message says how."""


@dataclass
class StreamedAnswer:
    """What became of one request; all times in seconds on one clock, at whose second 0 latencies begin."""

    kind: str = ""
    """Class of its prompt."""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """``(time, tokens so far)`` for everything that arrived together."""
    accepted: int | None = None
    """Accepted draft tokens; None where the server does not report them."""
    sent: float = float("nan")
    ended: float = float("nan")
    id: str = ""
    """The request id of the server."""
    prompt_tokens: int | None = None
    error: str | None = None
    left: bool = False
    """Whether the client hung up on purpose."""
    text: str = ""
    """Only where the client asked for it."""
    answer_at: float | None = None
    """When the first text after thinking arrived; None where the server reported no thinking."""
    thinking_tokens: int = 0
    """Tokens before that text."""
    answered_by: str = ""
    """``fast`` or ``deep``: the end that answered, where a deployment escalates requests (``escalation``)."""

    @property
    def tokens(self) -> int:
        """Number of output tokens."""
        return self.arrivals[-1][1] if self.arrivals else 0

    @property
    def ttft(self) -> float:
        """Time to first token; NaN without one."""
        return self.arrivals[0][0] if self.arrivals else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed after the first arrival; NaN when everything arrived at once."""
        if len(self.arrivals) < 2:
            return float("nan")
        (first_time, first_tokens), (last_time, last_tokens) = self.arrivals[0], self.arrivals[-1]
        return (last_tokens - first_tokens) / (last_time - first_time)

    def seconds_to(self, tokens: int) -> float:
        """Time until the answer had ``tokens`` tokens; NaN if it is shorter."""
        return next((when for when, so_far in self.arrivals if so_far >= tokens), float("nan"))

    def inter_token_latencies(self) -> np.ndarray:
        """One entry per token after the first arrival; tokens that arrive together share the time since the last."""
        times = np.array([when for when, _ in self.arrivals])
        tokens = np.diff([so_far for _, so_far in self.arrivals])
        return np.repeat(np.diff(times) / tokens, tokens)

    def since(self, start: float) -> Self:
        """The same answer on a clock whose second 0 is ``start``."""
        arrivals = [(when - start, tokens) for when, tokens in self.arrivals]
        answer_at = None if self.answer_at is None else self.answer_at - start
        return replace(self, arrivals=arrivals, sent=self.sent - start, ended=self.ended - start, answer_at=answer_at)


class TokenStream:
    """Reads the server-sent events of one answer.

    Args:
        answer: filled while the stream is read.
        on_text: called with each piece of text; without it, events are not parsed as JSON.

    """

    def __init__(self, answer: StreamedAnswer, on_text: Callable[[str], None] | None = None) -> None:
        self.answer = answer
        self._on_text = on_text
        self._rest = b""
        self._reports_usage = self._thinks = False
        self._finished = False

    def feed(self, data: bytes | bytearray, now: float) -> int:
        """Read what the socket had at ``now``; returns the number of tokens so far.

        Raises:
            StreamError: when the server reports an error inside the stream.

        """
        whole, newline, rest = (self._rest + data).rpartition(b"\n")
        self._rest = rest
        if newline:
            self._read(whole, now)
        return self.answer.tokens

    def end(self) -> None:
        """The connection has ended; raises StreamError where the answer is incomplete."""
        if not self._finished:
            raise StreamError("the answer broke off")
        if not self.answer.tokens:
            raise StreamError("the answer ended without a token")

    def _read(self, events: bytes, now: float) -> None:
        answer = self.answer
        if failed := _ERROR.search(events):
            raise StreamError(f"the answer ends with an error: {failed[1][:200].decode(errors='replace')}")
        if not answer.id and (found := _ID.search(events)):
            answer.id = found[1].decode(errors="replace")
        if answer.prompt_tokens is None and (found := _PROMPT_TOKENS.search(events)):
            answer.prompt_tokens = int(found[1])
        if found := _ACCEPTED.search(events):
            answer.accepted = int(found[1])
        before = answer.tokens
        self._count(events, now)
        if answer.answer_at is None:
            self._find_answer(events, now, before)
        self._finished = self._finished or b"[DONE]" in events
        if self._on_text is not None:
            self._read_text(events)

    def _find_answer(self, events: bytes, now: float, before: int) -> None:
        """Note when the thinking of a reasoning model ends, which vLLM streams in a field of its own."""
        self._thinks = self._thinks or _THINKING.search(events) is not None
        if not self._thinks:
            return
        if text := _TEXT.search(events):
            self.answer.answer_at = now
            # An event's count comes behind its text: those before the first text belong to thinking.
            self.answer.thinking_tokens = max([before, *map(int, _TOKENS.findall(events[: text.start()]))])
        else:
            self.answer.thinking_tokens = self.answer.tokens

    def _count(self, events: bytes, now: float) -> None:
        arrivals, tokens = self.answer.arrivals, self.answer.tokens
        counts = _TOKENS.findall(events)
        if counts:
            self._reports_usage = True
            total = max(map(int, counts))
        else:
            # Where a server does not report usage, an event with text counts as one token.
            texts = len(_TEXT.findall(events)) + len(_THINKING.findall(events))
            total = tokens + (0 if self._reports_usage else texts)
        if total <= tokens:
            return
        if arrivals and now - arrivals[-1][0] < MERGE_SECONDS:
            arrivals[-1] = (arrivals[-1][0], total)
        else:
            arrivals.append((now, total))

    def _read_text(self, events: bytes) -> None:
        for line in events.splitlines():
            if line.startswith(b"data: {"):
                choices = json.loads(line[len(b"data: ") :]).get("choices") or [{}]
                text = choices[0].get("text") or (choices[0].get("delta") or {}).get("content") or ""
                if text:
                    self.answer.text += text
                    if self._on_text is not None:
                        self._on_text(text)


def completion_body(model: str, prompt: str, **parameters: Any) -> dict[str, Any]:
    """A streamed request for ``/v1/completions`` that reports its token count with every event."""
    return {"model": model, "prompt": prompt, "stream": True, "stream_options": STREAM_OPTIONS, **parameters}
