"""Prefills a session's prompt while it is typed, and starts its answer when the typing pauses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from vllm_instant.interfaces.streaming import PrefillOutcome, PrefillProgress
from vllm_instant.streaming.conversation import Conversation
from vllm_instant.streaming.engine import Prompt, RequestError
from vllm_instant.streaming.session_manager import SessionManager
from vllm_instant.streaming.speculative_answer import SpeculativeAnswer
from vllm_instant.streaming.text import common_length

logger = logging.getLogger("vllm.instant")

Send = Callable[[dict[str, Any]], Awaitable[None]]
COALESCE_SECONDS = 0.004
"""Delay in seconds before a chunk is prefilled: a commit that follows its text within it comes first."""
RETRY_SECONDS = 0.02
"""First interval in seconds at which a session retries while the engine has no capacity; it doubles up to the last."""
MAX_RETRY_SECONDS = 0.16
"""Last interval in seconds at which a session retries."""
CHARACTERS_PER_TOKEN = 3.0
"""Assumed number of characters per token."""


class PrefillAhead:
    """The part of a session that works before a commit; the caller must ``close`` it.

    Args:
        manager: The sessions of the server.
        number: Unique number of the session, and its affinity.
        name: Name of the session, under which KV blocks are pinned.
        conversation: What the client has sent.
        send: Sends an event to the client.
        is_answering: Whether an answer is in progress.

    """

    def __init__(
        self,
        manager: SessionManager,
        number: int,
        name: str,
        conversation: Conversation,
        send: Send,
        is_answering: Callable[[], bool],
    ) -> None:
        self._manager = manager
        self._number = number
        self._name = name
        self._said = conversation
        self._send = send
        self._is_answering = is_answering
        self._last_change = manager.clock()
        self._changed = asyncio.Event()
        self._stable_ids: list[int] = []
        self._suffix = 0
        self._prompt = Prompt([])
        self._rendered: tuple[int, str] | None = None
        self._cached: list[int] = []
        self._speculative: SpeculativeAnswer | None = None
        self._tried_speculative = False
        self._is_pinned = False
        """Whether the KV blocks of the prefilled tokens are pinned."""
        self._tried_to_pin = False
        self._idled = False
        """Whether the blocks were unpinned because no text arrived."""
        self._retry_seconds = RETRY_SECONDS
        self._prefilling: asyncio.Task[None] | None = None
        self._reading = asyncio.get_running_loop().create_task(self._prefill_ahead())

    async def text_changed(self) -> None:
        """The client has changed its text or its request."""
        self._tried_speculative = False
        await self.discard_speculative()
        self.mark_changed()

    def mark_changed(self) -> None:
        """There may be more to prefill."""
        self._last_change = self._manager.clock()
        self._retry_seconds = RETRY_SECONDS
        if self._idled:
            # The blocks may be pinned again with new text.
            self._idled = self._tried_to_pin = False
        self._changed.set()

    async def take_answer(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
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

    async def close(self) -> None:
        """Stop prefilling and release all resources; no further event is sent."""
        tasks = [task for task in (self._reading, self._prefilling) if task is not None]
        for task in tasks:
            task.cancel()
        if self._speculative is not None:
            self._speculative.stop()
        await asyncio.wait(tasks)
        await self.discard_speculative()
        await self._unpin()

    async def _prefill_ahead(self) -> None:
        """Prefill the prompt as the plugin decides, until the session is closed."""
        while True:
            await asyncio.sleep(COALESCE_SECONDS)
            self._changed.clear()
            retry: float | None = None
            if self._said.configured and not self._is_answering():
                try:
                    retry = await self._prefill_chunk()
                    if retry == 0:
                        continue
                    if retry is None:
                        await self._answer_speculatively()
                except RequestError:
                    pass  # the commit reports it, unless the text is edited before
                except Exception:
                    logger.exception("Session %s prefills no further chunks", self._name)
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
        return self._name if self._is_pinned else None

    async def _unpin(self) -> None:
        if self._is_pinned:
            self._is_pinned = False
            await self._manager.unpin(self._name)

    async def _prefill_chunk(self) -> float | None:
        """Prefill one chunk if it is due.

        Returns the seconds after which another may be due: 0 for at once, None for not before the next change.
        """
        await self._render()
        self._cached = self._cached[: common_length(self._cached, self._stable_ids)]
        if self._stable_ids and not self._tried_to_pin:
            self._tried_to_pin = True
            self._is_pinned = await self._manager.pin(self._name)
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
            if self._is_answering() or (self._rendered or (-1, ""))[0] != self._said.version:
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

    async def _render(self) -> None:
        """Update the stable token ids if enough new text has arrived."""
        version, stable = key = self._said.stable
        if key == self._rendered:
            return
        if self._rendered is not None and self._rendered[0] == version and stable.startswith(self._rendered[1]):
            characters = len(stable) - len(self._rendered[1])
            if characters < self._manager.min_new_characters(
                len(self._stable_ids), CHARACTERS_PER_TOKEN, self._is_pinned
            ):
                return
        engine, text = self._manager.engine, self._said.typed.text
        if self._rendered is None or self._rendered[0] != version:
            self._suffix = await self._suffix_length()
        await self._manager.may_render(self._number, 2 * (len(text) + self._said.request_bytes))
        # The common prefix of two prompts with different ends is the template's beginning and the stable text.
        one = await engine.render(self._said.body(stable))
        other = await engine.render(self._said.body(text if text else "."))
        common = min(common_length(one.token_ids, other.token_ids), len(one.token_ids) - self._suffix)
        # Without text, the template's last token may still merge with the first characters.
        self._stable_ids = one.token_ids[: common if text else max(0, common - 1)]
        self._prompt, self._rendered = one, key

    async def _suffix_length(self) -> int:
        """Number of tokens that the template adds after the text; they are part of the prompt only at the commit."""
        one, other = [(await self._manager.engine.render(self._said.body(text))).token_ids for text in ("a", ".")]
        return common_length(one[::-1], other[::-1])

    async def _answer_speculatively(self) -> None:
        """Start the answer if the typing pauses and the plugin decides so."""
        seconds = self._manager.speculative_answer_delay()
        if seconds is None or self._tried_speculative or not self._said.typed.text:
            return
        if await self._changes_within(seconds):
            return
        deadline = self._manager.clock() + self._manager.max_speculative_answer_seconds()
        while not self._is_answering() and not self._manager.starts_speculative_answer():
            if self._manager.clock() >= deadline:
                return
            if await self._changes_within(RETRY_SECONDS):
                return
        if self._is_answering():
            return
        self._tried_speculative = True
        answer = self._speculative = SpeculativeAnswer(
            self._manager.engine, self._said.body(self._said.typed.text), self._number, self._pinned_name
        )
        self._manager.metrics.speculative_answers.labels("begun").inc()
        asyncio.get_running_loop().call_later(
            self._manager.max_speculative_answer_seconds(), self._expire_speculative, answer
        )

    def _expire_speculative(self, answer: SpeculativeAnswer) -> None:
        if self._speculative is answer:
            self._speculative = None
            self._manager.run_in_background(answer.discard())

    async def discard_speculative(self) -> None:
        """Abort the answer that was started before its commit, if there is one."""
        answer, self._speculative = self._speculative, None
        if answer is not None:
            await answer.discard()
