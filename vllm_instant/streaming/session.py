"""One prompt that is being typed, from its first character to the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from vllm_instant.interfaces.streaming import PrefillOutcome, PrefillProgress
from vllm_instant.streaming.connections import size_of
from vllm_instant.streaming.engine import Prompt, RequestError
from vllm_instant.streaming.events import (
    AppendText,
    CancelResponse,
    ClearText,
    ClientEvent,
    Commit,
    EventError,
    ReplaceText,
    UpdateSession,
)
from vllm_instant.streaming.session_manager import RefusedError, SessionManager
from vllm_instant.streaming.speculative_answer import SpeculativeAnswer
from vllm_instant.streaming.text import TextBuffer, TextError, common_length, stable_prefix_length

logger = logging.getLogger("vllm.instant")

Send = Callable[[dict[str, Any]], Awaitable[None]]
COALESCE_SECONDS = 0.004
"""Delay in seconds before a chunk is prefilled: a commit that follows its text within it comes first."""
RETRY_SECONDS = 0.02
"""First interval in seconds at which a session retries while the engine has no capacity; it doubles up to the last."""
MAX_RETRY_SECONDS = 0.16
"""Last interval in seconds at which a session retries."""
MAX_VALUES = 100_000
"""Maximum number of JSON values of a session's request."""
OWN_FIELDS = ("stream",)
"""Fields of the request that the session sets itself."""
CHARACTERS_PER_TOKEN = 3.0
"""Assumed number of characters per token."""


class Session:
    """One client's conversation; the caller must ``close`` it.

    Args:
        manager: The sessions of the server.
        number: Unique number of the session, and its affinity.
        send: Sends an event to the client.
        fixed: Fields of the request that the client cannot change.
        seconds: Maximum duration of the session; None for no limit.

    """

    def __init__(
        self,
        manager: SessionManager,
        number: int,
        send: Send,
        fixed: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> None:
        self.id = f"sess_{number}_{manager.new_name()}"
        self._last_event = self._last_change = manager.clock()
        self._ends_at = None if seconds is None else self._last_event + seconds
        self._fixed = dict(fixed or {})
        self._request_bytes = 0
        self._manager = manager
        self._number = number
        self._send = send
        self._request: dict[str, Any] = {}
        self._messages: list[dict[str, Any]] = []
        self._text = TextBuffer(manager.limits.max_text_characters)
        self._configured = False
        self._changed = asyncio.Event()
        self._stable_ids: list[int] = []
        self._suffix = 0
        self._prompt = Prompt([])
        self._rendered: tuple[int, str] | None = None
        self._cached: list[int] = []
        self._version = 0
        """Version of the request without its last message."""
        self._speculative: SpeculativeAnswer | None = None
        self._tried_speculative = False
        self._is_pinned = False
        """Whether the KV blocks of the prefilled tokens are pinned."""
        self._tried_to_pin = False
        self._idled = False
        """Whether the blocks were unpinned because no text arrived."""
        self._retry_seconds = RETRY_SECONDS
        self._prefilling: asyncio.Task[None] | None = None
        self._answering: asyncio.Task[None] | None = None
        self._reading = asyncio.get_running_loop().create_task(self._prefill_ahead())

    # ------------------------------------------------------------------------------------------- events

    async def handle(self, event: ClientEvent) -> None:
        """Handle an event of the client; raises ``EventError``."""
        self._last_event = self._manager.clock()
        if isinstance(event, UpdateSession):
            await self._update(event)
            return
        if isinstance(event, CancelResponse):
            await self.cancel()
            return
        if isinstance(event, Commit):
            await self._commit(event)
            return
        before = self._text.text
        try:
            if isinstance(event, AppendText):
                self._text.append(event.text)
            elif isinstance(event, ReplaceText):
                self._text.replace(event.start, event.end, event.text)
            elif isinstance(event, ClearText):
                self._text.replace(0, None, "")
            self._resize(self._request_bytes)
        except TextError as error:
            raise EventError(str(error), "invalid_text", event.event_id) from None
        except RefusedError as error:
            self._text.text = before
            raise EventError(str(error), "too_many_bytes", event.event_id, status=429) from None
        await self._text_changed()

    def _resize(self, request_bytes: int) -> None:
        text = self._text.text
        self._manager.resize(self._number, request_bytes + len(text) * (1 if text.isascii() else 4))
        self._request_bytes = request_bytes

    async def _update(self, event: UpdateSession) -> None:
        request = {key: value for key, value in event.session.items() if key not in OWN_FIELDS} | self._fixed
        messages = request.pop("messages", [])
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise EventError("session.messages must be a list of chat messages", event_id=event.event_id)
        size, size_before = size_of(event.session, MAX_VALUES), self._request_bytes
        try:
            self._resize(size)
        except RefusedError as error:
            raise EventError(str(error), "too_many_bytes", event.event_id, status=429) from None
        before = self._request, self._messages
        self._request, self._messages = request, messages
        try:
            await self._manager.may_render(self._number, size)
            await self._manager.engine.render(self._body("."))
        except RequestError as error:
            self._request, self._messages = before
            self._resize(size_before)
            raise EventError(str(error), "invalid_session", event.event_id) from None
        self._version += 1
        self._configured = True
        await self._text_changed()
        await self._send({"type": "session.updated", "session": {"id": self.id}})

    async def _text_changed(self) -> None:
        self._tried_speculative = False
        await self._discard_speculative()
        self._mark_changed()

    def _mark_changed(self) -> None:
        self._last_change = self._manager.clock()
        self._retry_seconds = RETRY_SECONDS
        if self._idled:
            # The blocks may be pinned again with new text.
            self._idled = self._tried_to_pin = False
        self._changed.set()

    async def _commit(self, event: Commit) -> None:
        if not self._configured:
            raise EventError("the session has no model yet: send session.update first", "no_session", event.event_id)
        if self.is_answering:
            raise EventError(
                "the last answer is not complete: wait for it, or send response.cancel", "busy", event.event_id
            )
        committed_at = self._manager.clock()
        await self._manager.may_render(self._number, len(self._text.text))
        request = self._body(self._text.text)
        chunks = await self._take_answer(request)
        text = self._text.text
        self._text.replace(0, None, "")
        self._answering = asyncio.get_running_loop().create_task(
            self._answer(chunks, text, committed_at, event.event_id)
        )

    async def _take_answer(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The answer to a committed request: the speculative one if its request is equal, otherwise a new one."""
        answer, self._speculative = self._speculative, None
        if answer is not None and answer.request == request:
            self._manager.metrics.speculative_answers.labels("used").inc()
            return answer.chunks()
        if answer is not None:
            await answer.discard()
        if self._prefilling is not None:
            self._prefilling.cancel()  # the answer prefills the rest itself
        return self._manager.engine.answer(request, self._number, session=self._pinned_name)

    @property
    def is_answering(self) -> bool:
        """Whether an answer is in progress."""
        return self._answering is not None and not self._answering.done()

    @property
    def seconds_left(self) -> float:
        """Seconds until the session is closed: at its end, or when it has been idle too long.

        A session with an answer in progress is not idle.
        """
        now = self._manager.clock()
        left = self._manager.limits.idle_seconds - (0.0 if self.is_answering else now - self._last_event)
        return left if self._ends_at is None else min(left, self._ends_at - now)

    def closing_event(self) -> dict[str, Any]:
        """Return the error event that says why the session is closed."""
        if self._ends_at is not None and self._manager.clock() >= self._ends_at:
            return error_event("the session has reached the duration that its token allows", "expired", status=408)
        idle_seconds = self._manager.limits.idle_seconds
        return error_event(f"no event for {idle_seconds:g} seconds", "idle", status=408)

    async def finished(self) -> None:
        """Return when no answer is in progress."""
        if self._answering is not None:
            await asyncio.wait([self._answering])

    async def cancel(self) -> None:
        """Abort the answer, if there is one."""
        if self._answering is not None and not self._answering.done():
            self._answering.cancel()
            await self.finished()
            await self._send({"type": "response.done", "status": "cancelled"})

    async def _answer(
        self, chunks: AsyncIterator[dict[str, Any]], text: str, committed_at: float, event_id: str | None
    ) -> None:
        contents: list[str] = []
        has_tool_calls = False
        first: float | None = None
        await self._send({"type": "input_text.committed", "event_id": event_id})
        try:
            async with aclosing(chunks) as answer:  # type: ignore[type-var]
                async for chunk in answer:
                    choices = chunk.get("choices") or []
                    if first is None and any(_has_token(choice) for choice in choices):
                        first = self._manager.clock() - committed_at
                        self._manager.metrics.ttft.observe(first)
                    for choice in choices:
                        delta = choice.get("delta") or {}
                        if choice.get("index", 0) == 0:
                            contents.append(delta.get("content") or "")
                        has_tool_calls = has_tool_calls or bool(delta.get("tool_calls"))
                    self._last_event = self._manager.clock()
                    await self._send({"type": "response.chunk", "chunk": chunk})
        except RequestError as error:
            await self._failed(error_event(str(error), "request_failed", event_id, error.code), text)
            return
        except Exception as error:
            logger.exception("An answer of session %s failed", self.id)
            message = f"the answer failed: {type(error).__name__}"
            await self._failed(error_event(message, "server_error", event_id, 500), text)
            return
        # The next prompt follows this turn, except after tool calls, to which the client responds.
        if not has_tool_calls:
            self._messages = [
                *self._messages,
                {"role": "user", "content": text},
                {"role": "assistant", "content": "".join(contents)},
            ]
            self._request_bytes += 4 * (len(text) + sum(map(len, contents)))
        self._version += 1
        self._mark_changed()
        await self._send({"type": "response.done", "status": "completed", "first_token_seconds": first})

    async def _failed(self, event: dict[str, Any], text: str) -> None:
        """The answer failed: restore the text from before the commit, so that it can be edited."""
        with suppress(TextError):
            self._text.replace(0, 0, text)
        self._mark_changed()
        await self._send({**event, "type": "response.done", "status": "failed"})

    async def close(self) -> None:
        """Release all resources; no further event is sent."""
        tasks = [task for task in (self._reading, self._prefilling, self._answering) if task is not None]
        for task in tasks:
            task.cancel()
        if self._speculative is not None:
            self._speculative.stop()
        await asyncio.wait(tasks)
        await self._discard_speculative()
        await self._unpin()

    # ------------------------------------------------------------------------------------------- prefill

    def _body(self, text: str) -> dict[str, Any]:
        return {**self._request, "messages": [*self._messages, {"role": "user", "content": text}]}

    async def _prefill_ahead(self) -> None:
        """Prefill the prompt as the plugin decides, until the session is closed."""
        while True:
            await asyncio.sleep(COALESCE_SECONDS)
            self._changed.clear()
            retry: float | None = None
            if self._configured and not self.is_answering:
                try:
                    retry = await self._prefill_chunk()
                    if retry == 0:
                        continue
                    if retry is None:
                        await self._answer_speculatively()
                except RequestError:
                    pass  # the commit reports it, unless the text is edited before
                except Exception:
                    logger.exception("Session %s prefills no further chunks", self.id)
                    return
            await self._wait_for_more(retry)

    async def _wait_for_more(self, retry: float | None) -> None:
        """Return at the next change or after ``retry`` seconds; unpin the KV blocks after the idle time."""
        limits = self._manager.pin_limits
        if self._is_pinned and limits is not None:
            left = max(0.0, self._last_change + limits.idle_seconds - self._manager.clock())
            if retry is None or left <= retry:
                if await self._changes_within(left):
                    return
                await self._unpin()
                self._idled = True
        if retry is None:
            await self._changed.wait()
        else:
            await self._changes_within(retry)

    async def _changes_within(self, seconds: float) -> bool:
        """Wait for a change; returns False after ``seconds`` without one."""
        # Not asyncio.wait_for: before Python 3.12 it can lose a cancellation that coincides with the change.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._changed.wait()
        return False

    @property
    def _pinned_name(self) -> str | None:
        return self.id if self._is_pinned else None

    async def _unpin(self) -> None:
        if self._is_pinned:
            self._is_pinned = False
            await self._manager.unpin(self.id)

    async def _prefill_chunk(self) -> float | None:
        """Prefill one chunk if it is due.

        Returns the seconds after which another may be due: 0 for at once, None for not before the next change.
        """
        await self._render()
        self._cached = self._cached[: common_length(self._cached, self._stable_ids)]
        if self._stable_ids and not self._tried_to_pin:
            self._tried_to_pin = True
            self._is_pinned = await self._manager.pin(self.id)
        block_size = self._manager.engine.block_size
        progress = PrefillProgress(len(self._stable_ids), len(self._cached), block_size, self._is_pinned)
        if self._manager.next_chunk(progress, idle=True) <= progress.cached_tokens:
            return None
        async with self._manager.prefill_slots:
            length = self._manager.next_chunk(progress)
            if length <= progress.cached_tokens:
                # The slot is given up: what this session may not prefill now, another may.
                retry, self._retry_seconds = self._retry_seconds, min(2 * self._retry_seconds, MAX_RETRY_SECONDS)
                return retry
            self._retry_seconds = RETRY_SECONDS
            if self.is_answering or (self._rendered or (-1, ""))[0] != self._version:
                return None  # the prompt was committed in the meantime
            load = self._manager.engine.load()
            began = self._manager.clock()
            prompt = self._prompt
            self._prefilling = asyncio.get_running_loop().create_task(
                self._manager.engine.prefill(prompt, length, self._number, self._pinned_name)
            )
            await asyncio.wait([self._prefilling])
            if self._prefilling.cancelled():
                return None
            self._prefilling.result()
            tokens = length - progress.cached_tokens
            self._manager.observe(PrefillOutcome(tokens, self._manager.clock() - began, load))
            self._cached = prompt.token_ids[:length]
        await self._send({"type": "input_text.prefilled", "tokens": length})
        return 0.0

    def _key(self) -> tuple[int, str]:
        return self._version, self._text.text[: stable_prefix_length(self._text.text)]

    async def _render(self) -> None:
        """Update the stable token ids if enough new text has arrived."""
        version, stable = key = self._key()
        if key == self._rendered:
            return
        if self._rendered is not None and self._rendered[0] == version and stable.startswith(self._rendered[1]):
            characters = len(stable) - len(self._rendered[1])
            if characters < self._manager.min_new_characters(
                len(self._stable_ids), CHARACTERS_PER_TOKEN, self._is_pinned
            ):
                return
        engine, text = self._manager.engine, self._text.text
        if self._rendered is None or self._rendered[0] != version:
            self._suffix = await self._suffix_length()
        await self._manager.may_render(self._number, 2 * (len(text) + self._request_bytes))
        # The common prefix of two prompts with different ends is the template's beginning and the stable text.
        one = await engine.render(self._body(stable))
        other = await engine.render(self._body(text if text else "."))
        common = min(common_length(one.token_ids, other.token_ids), len(one.token_ids) - self._suffix)
        # Without text, the template's last token may still merge with the first characters.
        self._stable_ids = one.token_ids[: common if text else max(0, common - 1)]
        self._prompt, self._rendered = one, key

    async def _suffix_length(self) -> int:
        """Number of tokens that the template adds after the text; they are part of the prompt only at the commit."""
        one, other = [(await self._manager.engine.render(self._body(text))).token_ids for text in ("a", ".")]
        return common_length(one[::-1], other[::-1])

    async def _answer_speculatively(self) -> None:
        """Start the answer if the typing pauses and the plugin decides so."""
        seconds = self._manager.speculative_answer_delay()
        if seconds is None or self._tried_speculative or not self._text.text:
            return
        if await self._changes_within(seconds):
            return
        deadline = self._manager.clock() + self._manager.max_speculative_answer_seconds()
        while not self.is_answering and not self._manager.starts_speculative_answer():
            if self._manager.clock() >= deadline:
                return
            if await self._changes_within(RETRY_SECONDS):
                return
        if self.is_answering:
            return
        self._tried_speculative = True
        answer = self._speculative = SpeculativeAnswer(
            self._manager.engine, self._body(self._text.text), self._number, self._pinned_name
        )
        self._manager.metrics.speculative_answers.labels("begun").inc()
        asyncio.get_running_loop().call_later(
            self._manager.max_speculative_answer_seconds(), self._expire_speculative, answer
        )

    def _expire_speculative(self, answer: SpeculativeAnswer) -> None:
        if self._speculative is answer:
            self._speculative = None
            self._manager.run_in_background(answer.discard())

    async def _discard_speculative(self) -> None:
        answer, self._speculative = self._speculative, None
        if answer is not None:
            await answer.discard()


def _has_token(choice: dict[str, Any]) -> bool:
    """Whether a choice of a chunk has a token: the first chunk of a choice has only the role."""
    delta = choice.get("delta") or {}
    return bool(
        delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content") or delta.get("tool_calls")
    ) or (choice.get("finish_reason") is not None)


def error_event(message: str, code: str, event_id: str | None = None, status: int = 400) -> dict[str, Any]:
    """Return an error event for the client; ``status`` is the corresponding HTTP status."""
    return {"type": "error", "error": {"message": message, "code": code, "event_id": event_id, "status": status}}
