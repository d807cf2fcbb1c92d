"""One prompt that is still arriving, from its first character to the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from vllm_instant.interfaces.streaming import PrefillOutcome, PrefillProgress
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
from vllm_instant.streaming.session_manager import SessionManager
from vllm_instant.streaming.speculative_answer import EarlyAnswer
from vllm_instant.streaming.text import TextBuffer, TextError, common_length, settled_length

logger = logging.getLogger("vllm.instant")

Send = Callable[[dict[str, Any]], Awaitable[None]]
TOGETHER_SECONDS = 0.004
"""Text and the commit right behind it arrive so close together: a chunk begun between them would be in the way."""
RETRY_SECONDS = 0.02
"""After which a session asks again when the engine had no room for it."""
OWN_FIELDS = ("stream",)
"""What a session decides itself, whatever the client says."""
CHARACTERS_A_TOKEN = 3.0
"""Before a prompt has shown its own ratio."""


class Session:
    """One client's conversation. Whoever opens one must ``close`` it.

    Args:
        host: what all sessions of the server share.
        number: unique in the host; also its affinity.
        send: hands an event to the client.

    """

    def __init__(self, host: SessionManager, number: int, send: Send) -> None:
        self.id = f"sess_{number}_{host.new_name()}"
        self._last_event = host.clock()
        self._host = host
        self._number = number
        self._send = send
        self._request: dict[str, Any] = {}
        self._messages: list[dict[str, Any]] = []
        self._text = TextBuffer(host.limits.max_text_characters)
        self._configured = False
        self._changed = asyncio.Event()
        self._settled: list[int] = []
        self._suffix = 0
        self._prompt = Prompt([])
        self._rendered: tuple[int, str] | None = None
        self._cached: list[int] = []
        self._version = 0
        """Of the request without its last message."""
        self._early: EarlyAnswer | None = None
        self._tried_early = False
        self._holds = False
        """Whether the engine keeps the blocks of what was read."""
        self._asked_to_hold = False
        self._prefilling: asyncio.Task[None] | None = None
        self._answering: asyncio.Task[None] | None = None
        self._reading = asyncio.get_running_loop().create_task(self._read_ahead())

    # ------------------------------------------------------------------------------------------- events

    async def handle(self, event: ClientEvent) -> None:
        """Carry out what the client asks for; raises EventError."""
        self._last_event = self._host.clock()
        if isinstance(event, UpdateSession):
            await self._update(event)
            return
        if isinstance(event, CancelResponse):
            await self.cancel()
            return
        if isinstance(event, Commit):
            await self._commit(event)
            return
        try:
            if isinstance(event, AppendText):
                self._text.append(event.text)
            elif isinstance(event, ReplaceText):
                self._text.replace(event.start, event.end, event.text)
            elif isinstance(event, ClearText):
                self._text.replace(0, None, "")
        except TextError as error:
            raise EventError(str(error), "invalid_text", event.event_id) from None
        await self._text_changed()

    async def _update(self, event: UpdateSession) -> None:
        request = {key: value for key, value in event.session.items() if key not in OWN_FIELDS}
        messages = request.pop("messages", [])
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise EventError("session.messages must be a list of chat messages", event_id=event.event_id)
        before = self._request, self._messages
        self._request, self._messages = request, messages
        try:
            await self._host.engine.render(self._body("."))
        except RequestError as error:
            self._request, self._messages = before
            raise EventError(str(error), "invalid_session", event.event_id) from None
        self._version += 1
        self._configured = True
        await self._text_changed()
        await self._send({"type": "session.updated", "session": {"id": self.id}})

    async def _text_changed(self) -> None:
        self._tried_early = False
        await self._discard_early()
        self._changed.set()

    async def _commit(self, event: Commit) -> None:
        if not self._configured:
            raise EventError(
                "nothing says which model answers: send session.update first", "no_session", event.event_id
            )
        if self.is_answering:
            raise EventError("the last answer is not complete: wait, or send response.cancel", "busy", event.event_id)
        committed_at = self._host.clock()
        request = self._body(self._text.text)
        chunks = await self._take_answer(request)
        text = self._text.text
        self._text.replace(0, None, "")
        self._answering = asyncio.get_running_loop().create_task(
            self._answer(chunks, text, committed_at, event.event_id)
        )

    async def _take_answer(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The answer to a committed request: one that was begun early, if it fits, or else a new one."""
        early, self._early = self._early, None
        if early is not None and early.request == request:
            self._host.numbers.early.labels("used").inc()
            return early.chunks()
        if early is not None:
            await early.discard()
        if self._prefilling is not None:
            self._prefilling.cancel()  # what it has read is cached; the rest the answer reads itself
        return self._host.engine.answer(request, self._number, hold=self._hold_name)

    @property
    def is_answering(self) -> bool:
        """Whether an answer is on its way."""
        return self._answering is not None and not self._answering.done()

    @property
    def seconds_left(self) -> float:
        """Until it has been idle too long; a session whose answer is on its way is not idle."""
        idle = 0.0 if self.is_answering else self._host.clock() - self._last_event
        return self._host.limits.idle_seconds - idle

    async def finished(self) -> None:
        """Return when no answer is on its way."""
        if self._answering is not None:
            await asyncio.wait([self._answering])

    async def cancel(self) -> None:
        """Stop the answer, if there is one."""
        if self._answering is not None and not self._answering.done():
            self._answering.cancel()
            await self.finished()
            await self._send({"type": "response.done", "status": "cancelled"})

    async def _answer(
        self, chunks: AsyncIterator[dict[str, Any]], text: str, committed_at: float, event_id: str | None
    ) -> None:
        said: list[str] = []
        plain = True
        first: float | None = None
        await self._send({"type": "input_text.committed", "event_id": event_id})
        try:
            async with aclosing(chunks) as answer:  # type: ignore[type-var]
                async for chunk in answer:
                    choices = chunk.get("choices") or []
                    if first is None and any(_has_token(choice) for choice in choices):
                        first = self._host.clock() - committed_at
                        self._host.numbers.ttft.observe(first)
                    for choice in choices:
                        delta = choice.get("delta") or {}
                        if choice.get("index", 0) == 0:
                            said.append(delta.get("content") or "")
                        plain = plain and not delta.get("tool_calls")
                    self._last_event = self._host.clock()
                    await self._send({"type": "response.chunk", "chunk": chunk})
        except RequestError as error:
            await self._failed(error_event(str(error), "request_failed", event_id, error.code), text)
            return
        except Exception as error:
            logger.exception("An answer of session %s failed", self.id)
            message = f"the answer failed: {type(error).__name__}"
            await self._failed(error_event(message, "server_error", event_id, 500), text)
            return
        # The conversation goes on: the next prompt stands behind this turn. Tool calls are for the client to answer.
        if plain:
            self._messages = [
                *self._messages,
                {"role": "user", "content": text},
                {"role": "assistant", "content": "".join(said)},
            ]
        self._version += 1
        self._changed.set()
        await self._send({"type": "response.done", "status": "completed", "first_token_seconds": first})

    async def _failed(self, event: dict[str, Any], text: str) -> None:
        """Nothing was answered: the text is as before the commit, so that it can be edited."""
        with suppress(TextError):
            self._text.replace(0, 0, text)
        self._changed.set()
        await self._send({**event, "type": "response.done", "status": "failed"})

    async def close(self) -> None:
        """Free everything; no event is sent any more."""
        tasks = [task for task in (self._reading, self._prefilling, self._answering) if task is not None]
        for task in tasks:
            task.cancel()
        if self._early is not None:
            self._early.stop()
        await asyncio.wait(tasks)
        await self._discard_early()
        await self._let_go()

    # -------------------------------------------------------------------------------------- reading ahead

    def _body(self, text: str) -> dict[str, Any]:
        return {**self._request, "messages": [*self._messages, {"role": "user", "content": text}]}

    async def _read_ahead(self) -> None:
        """Keep as much of the prompt in the cache as the plugin wants, as long as the session lives."""
        while True:
            await asyncio.sleep(TOGETHER_SECONDS)
            self._changed.clear()
            if self._configured and not self.is_answering:
                try:
                    if await self._read_more():
                        continue
                    await self._answer_early()
                except RequestError:
                    pass  # said when the prompt is committed; it may be edited before
                except Exception:
                    logger.exception("Session %s reads no more ahead", self.id)
                    return
            await self._wait_for_more()

    async def _wait_for_more(self) -> None:
        """Return when there is something to look at; meanwhile nothing is held for longer than allowed."""
        holds = self._host.holds
        if self._holds and holds is not None and not await self._changes_within(holds.idle_seconds):
            await self._let_go()
            # With new text it may hold again; till then what it has read may be lost.
            self._asked_to_hold = False
        await self._changed.wait()

    async def _changes_within(self, seconds: float) -> bool:
        """Wait for a change; whether there was one in time."""
        # Not asyncio.wait_for: before Python 3.12 it loses a cancellation that comes together with the change.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._changed.wait()
        return False

    @property
    def _hold_name(self) -> str | None:
        return self.id if self._holds else None

    async def _let_go(self) -> None:
        if self._holds:
            self._holds = False
            await self._host.unpin(self.id)

    async def _read_more(self) -> bool:
        """Read one chunk, if that is due; whether something may be due right after."""
        await self._render()
        self._cached = self._cached[: common_length(self._cached, self._settled)]
        if self._settled and not self._asked_to_hold:
            self._asked_to_hold = True
            self._holds = await self._host.hold(self.id)
        block_size = self._host.engine.block_size
        progress = PrefillProgress(len(self._settled), len(self._cached), block_size, self._holds)
        if self._host.next_chunk(progress, idle=True) <= progress.cached_tokens:
            return False
        # Who waits for room in the engine keeps the turn: there is none for the others either.
        async with self._host.turn:
            while (length := self._host.next_chunk(progress)) <= progress.cached_tokens:
                if await self._changes_within(RETRY_SECONDS):
                    return True
            if self.is_answering or (self._rendered or (-1, ""))[0] != self._version:
                return False  # committed meanwhile
            load = self._host.engine.load()
            began = self._host.clock()
            prompt = self._prompt
            self._prefilling = asyncio.get_running_loop().create_task(
                self._host.engine.prefill(prompt, length, self._number, self._hold_name)
            )
            await asyncio.wait([self._prefilling])
            if self._prefilling.cancelled():
                return False
            self._prefilling.result()
            tokens = length - progress.cached_tokens
            self._host.observe(PrefillOutcome(tokens, self._host.clock() - began, load))
            self._cached = prompt.token_ids[:length]
        await self._send({"type": "input_text.prefilled", "tokens": length})
        return True

    def _key(self) -> tuple[int, str]:
        return self._version, self._text.text[: settled_length(self._text.text)]

    async def _render(self) -> None:
        """Bring ``_settled`` up to date, where enough text has arrived to make a difference."""
        version, settled = key = self._key()
        if key == self._rendered:
            return
        if self._rendered is not None and self._rendered[0] == version and settled.startswith(self._rendered[1]):
            characters = len(settled) - len(self._rendered[1])
            if characters < self._host.worth_rendering(len(self._settled), CHARACTERS_A_TOKEN, self._holds):
                return
        engine, text = self._host.engine, self._text.text
        if self._rendered is None or self._rendered[0] != version:
            self._suffix = await self._suffix_length()
        # What the prompt has in common with that of other text at its end is the template's beginning and the text.
        one = await engine.render(self._body(settled))
        other = await engine.render(self._body(text if text else "."))
        common = min(common_length(one.token_ids, other.token_ids), len(one.token_ids) - self._suffix)
        # Where there is no text yet, nothing says how the template's last token goes together with what comes.
        self._settled = one.token_ids[: common if text else max(0, common - 1)]
        self._prompt, self._rendered = one, key

    async def _suffix_length(self) -> int:
        """Tokens that the template puts behind the text: they come with the commit."""
        one, other = [(await self._host.engine.render(self._body(text))).token_ids for text in ("a", ".")]
        return common_length(one[::-1], other[::-1])

    async def _answer_early(self) -> None:
        """Begin the answer if the person pauses and the plugin wants it."""
        seconds = self._host.speculative_answer_delay()
        if seconds is None or self._tried_early or not self._text.text:
            return
        if await self._changes_within(seconds):
            return
        deadline = self._host.clock() + self._host.max_speculative_answer_seconds()
        while not self.is_answering and not self._host.starts_speculative_answer():
            if self._host.clock() >= deadline:
                return
            if await self._changes_within(RETRY_SECONDS):
                return
        if self.is_answering:
            return
        self._tried_early = True
        early = self._early = EarlyAnswer(self._host.engine, self._body(self._text.text), self._number, self._hold_name)
        self._host.numbers.early.labels("begun").inc()
        asyncio.get_running_loop().call_later(self._host.max_speculative_answer_seconds(), self._expire_early, early)

    def _expire_early(self, early: EarlyAnswer) -> None:
        if self._early is early:
            self._early = None
            self._host.keep(early.discard())

    async def _discard_early(self) -> None:
        early, self._early = self._early, None
        if early is not None:
            await early.discard()


def _has_token(choice: dict[str, Any]) -> bool:
    """Whether a choice of a chunk carries a token: the first chunk of a choice only names the role."""
    delta = choice.get("delta") or {}
    return bool(
        delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content") or delta.get("tool_calls")
    ) or (choice.get("finish_reason") is not None)


def error_event(message: str, code: str, event_id: str | None = None, status: int = 400) -> dict[str, Any]:
    """What a client is told of a mistake; ``status`` is the HTTP status that says the same."""
    return {"type": "error", "error": {"message": message, "code": code, "event_id": event_id, "status": status}}
