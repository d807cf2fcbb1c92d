"""One request under the guard: what vLLM's output processor would send goes in, what was judged comes out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Protocol

from vllm_instant.guard.answer import GuardedAnswer
from vllm_instant.guard.service import GuardService
from vllm_instant.guard.window import Release

CONTENT_FILTER = "content_filter"
"""The finish reason of an answer that the guard ended, as in OpenAI's API."""
POLL_SECONDS = 0.001
"""How often a verdict is asked for where no event loop can be woken (vLLM's ``LLM``)."""


class ShownEmptyText(str):
    """The empty text of a stopped answer.

    vLLM's API server sends no event for an output without text and tokens, which it takes for a part of a prefill; the
    client would not learn that its answer was stopped.
    """

    __slots__ = ()

    def __bool__(self) -> bool:
        return True


class RequestOwner(Protocol):
    """What a request knows of the guard of its output processor."""

    service: GuardService
    processor: Any

    def stopped(self, state: Any, is_between_steps: bool) -> None:
        """The guard has ended a request."""
        ...


class TokenText:
    """The text of a request's tokens, with the position at which each of them ends.

    The detokenizer of the request counts along; a request without one (``detokenize=False``) gets its own here.

    Args:
        request: vLLM's ``EngineCoreRequest``.
        state: vLLM's ``RequestState``.
        tokenizer: The model's tokenizer.

    """

    def __init__(self, request: Any, state: Any, tokenizer: Any) -> None:
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        self._is_own = not hasattr(state.detokenizer, "decode_next")
        self._detokenizer = state.detokenizer
        if self._is_own:
            self._detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
        self._ends: list[int] = []  # of tokens that were not read
        self._token_ids: list[int] = []  # the same tokens
        self._decoded = 0
        self._read = 0
        decode_next = self._detokenizer.decode_next

        def measured(token_id: int) -> str:
            text: str = decode_next(token_id)
            self._decoded += len(text)
            self._ends.append(self._decoded)
            return text

        self._detokenizer.decode_next = measured

    def read(self, new_token_ids: Sequence[int], finish_reason: Any) -> tuple[str, list[int], list[int]]:
        """Return the new text, and for the tokens whose text ends in it their ends and ids.

        Text in which a stop string may begin is left for later, because vLLM may still take it away.
        """
        detokenizer = self._detokenizer
        is_finished = finish_reason is not None
        if self._is_own:
            detokenizer.update(list(new_token_ids), is_finished and finish_reason.name == "STOP")
        self._token_ids.extend(new_token_ids)
        length = len(detokenizer.output_text)
        # A stop token has no text; what follows a stop string is neither in the text nor among the new tokens.
        ends = [min(end, length) for end in self._ends[: len(self._token_ids)]]
        ends += [length] * (len(self._token_ids) - len(ends))
        limit = length if is_finished else max(self._read, length - detokenizer.stop_buffer_length)
        count = len(ends) if is_finished else sum(end <= limit for end in ends)
        text: str = detokenizer.output_text[self._read : limit]
        self._read = limit
        token_ids = self._token_ids[:count]
        self._ends, self._token_ids = ends[count:], self._token_ids[count:]
        return text, ends[:count], token_ids

    def close(self) -> None:
        """Undo the measuring, and with it a circle of references."""
        vars(self._detokenizer).pop("decode_next", None)


class GuardedRequest:
    """One request.

    Args:
        guard: The guard of the output processor.
        state: vLLM's ``RequestState``.
        loop: The API server's event loop; None where there is none.

    """

    def __init__(self, guard: RequestOwner, state: Any, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self._guard = guard
        self._state = state
        self._timer: asyncio.TimerHandle | None = None
        self._due: float | None = None
        self._is_emitting = False
        self._is_aborted = False
        self._finish: tuple[Any, Any, tuple[Any, ...], dict[str, Any]] = (None, None, (), {})
        self._pending: list[Release] = []
        self._token_ids: list[int] = []
        self._text_so_far = ""
        self._tokens_so_far: list[int] = []
        self._cumulative_logprob = 0.0
        self._masks: list[Any] = []

    def start(self, answer: GuardedAnswer, text: TokenText, message: str) -> None:
        """Receive the parts that need this object to exist."""
        self._answer = answer
        self._text = text
        self._message = message

    def wake(self) -> None:
        """A verdict may have changed; from any thread."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.update)

    def update(self) -> None:
        """Send what may be released between two steps."""
        if self.loop is None or self._answer.has_ended:
            return
        release = self._answer.take(is_awake=True)
        if release is not None:
            output = self._emit(release, is_between_steps=True)
            if output is not None and self._state.queue is not None:
                self._state.queue.put(output)
        self._schedule()

    def on_output(
        self,
        make: Any,
        new_token_ids: Sequence[int],
        finish_reason: Any,
        stop_reason: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return what the client may have of everything so far, in the place of vLLM's output."""
        if self._is_emitting:
            return make(new_token_ids, None, finish_reason, stop_reason, *args, **kwargs)
        answer = self._answer
        if answer.has_ended:
            return None
        if finish_reason is not None:
            self._finish = (finish_reason, stop_reason, args, kwargs)
            if finish_reason.name in ("ABORT", "ERROR"):
                self._is_aborted = True
                aborted = answer.abort()
                return self._emit(aborted) if aborted is not None else None
        text, ends, token_ids = self._text.read(new_token_ids, finish_reason)
        self._token_ids.extend(token_ids)
        answer.add(text, ends, token_ids, finish_reason is not None)
        release = answer.take()
        if release is None and finish_reason is not None and self.loop is None:
            release = self._wait()
        output = self._emit(release) if release is not None else None
        self._schedule()
        return output

    def _wait(self) -> Release:
        """Wait for the end of the answer where nothing can be sent later."""
        while (release := self._answer.take(is_awake=True)) is None:
            time.sleep(POLL_SECONDS)
        return release

    def _schedule(self) -> None:
        deadline = None if self._answer.has_ended else self._answer.deadline()
        if self.loop is None or deadline == self._due:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = deadline
        if deadline is not None:
            seconds = max(0.0, deadline - self._guard.service.clock())
            self._timer = self.loop.call_later(seconds, self._on_time)

    def _on_time(self) -> None:
        self._timer = self._due = None
        self.update()

    # ------------------------------------------------------------------------------------- outputs

    def _emit(self, release: Release, is_between_steps: bool = False) -> Any:
        """Make vLLM's output for a release; vLLM asks ``completion_output`` for its content."""
        from vllm.v1.engine import FinishReason

        self._pending.append(release)
        finish_reason, stop_reason, args, kwargs = self._finish
        if not release.is_final:
            finish_reason, stop_reason, args, kwargs = None, None, (), {}
        elif release.is_stopped and not self._is_aborted:
            finish_reason, stop_reason, args, kwargs = FinishReason.STOP, None, (), {}
        self._is_emitting = True
        try:
            output = self._state.make_request_output([], None, finish_reason, stop_reason, *args, **kwargs)
        finally:
            self._is_emitting = False
        if release.is_final:
            self._end(release, is_between_steps)
        return output

    def _end(self, release: Release, is_between_steps: bool) -> None:
        self._text.close()
        if release.is_stopped and not self._is_aborted:
            self._guard.stopped(self._state, is_between_steps)
        parent = self._state.parent_req
        # An answer that ended between steps does not make vLLM free its parent.
        if parent is not None and not parent.child_requests:
            self._guard.processor.parent_requests.pop(parent.request_id, None)

    def completion_output(self, output: Any) -> Any:
        """Put the released text, tokens and log probabilities into vLLM's ``CompletionOutput``."""
        releases, self._pending = self._pending, []
        text = "".join(release.text for release in releases)
        tokens = [index for release in releases for index in release.tokens]
        is_stopped = bool(releases) and releases[-1].is_stopped
        if is_stopped:
            output.weight_versions = output.routed_experts = None
            if not self._is_aborted:
                text += self._message
                output.finish_reason = CONTENT_FILTER
        logprobs = self._state.logprobs_processor.logprobs
        if output.cumulative_logprob is not None and logprobs is not None:
            self._cumulative_logprob += sum(logprobs[i][self._token_ids[i]].logprob for i in tokens)
            output.cumulative_logprob = self._cumulative_logprob
        if self._state.output_kind.name != "DELTA":
            self._text_so_far += text
            self._tokens_so_far += tokens
            text, tokens = self._text_so_far, self._tokens_so_far
            self._masks = output.sampling_mask.token_ids if output.sampling_mask is not None else []
        elif output.sampling_mask is not None:
            self._masks += output.sampling_mask.token_ids
        if is_stopped and not text:
            text = ShownEmptyText()
        output.text = text
        output.token_ids = [self._token_ids[i] for i in tokens]
        if output.logprobs is not None:
            output.logprobs = [logprobs[i] for i in tokens]
        if output.sampling_mask is not None:
            output.sampling_mask.token_ids = [self._masks[i] for i in tokens]
        return output
