"""One answer under a guard: generated text goes in, and what the client may have comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_instant.guard.judgment import Judgment, PromptJudgment
from vllm_instant.guard.service import GuardService
from vllm_instant.guard.window import Release, Window
from vllm_instant.interfaces.guard import Action, Side, Verdict

EXCERPT_BEFORE = 40
"""Characters before a violation in its excerpt."""


class GuardedAnswer:
    """An answer, from its first token to its end.

    Args:
        service: The API server's guard.
        request_id: The engine's id of the request.
        window: What may be released.
        judgment: The judgment of the answer; None where only prompts are judged.
        prompt: The judgment of the prompt; None where only answers are judged.
        on_prompt: Called when the judgment of the prompt is settled.

    """

    def __init__(
        self,
        service: GuardService,
        request_id: str,
        window: Window,
        judgment: Judgment | None,
        prompt: PromptJudgment | None,
        on_prompt: Callable[[], None],
    ) -> None:
        self._service = service
        self._request_id = request_id
        self.window = window
        self._judgment = judgment
        self._prompt = prompt
        self._recent = ""  # the end of the text, for excerpts
        self._length = 0
        self._has_recorded = False
        if prompt is not None and not prompt.is_settled:
            prompt.listeners.append(on_prompt)

    @property
    def has_ended(self) -> bool:
        return self.window.has_ended

    def add(self, text: str, ends: Sequence[int], token_ids: Sequence[int], is_finished: bool) -> None:
        """Add generated text with its tokens; ``ends`` are their last positions in the text."""
        now = self._service.clock()
        self.window.extend(text, ends, now)
        self._length += len(text)
        if self._service.options.log_text:
            self._recent = (self._recent + text)[-4 * EXCERPT_BEFORE :]
        if is_finished:
            self.window.finish(now)
        if self._judgment is None:
            self.window.apply(Verdict(self._length))
            return
        self._judgment.add(text, token_ids, is_finished)
        self._judge()

    def take(self, is_awake: bool = False) -> Release | None:
        """Return the next part for the client, if any; with ``is_awake`` the plugin is asked again before."""
        if self.window.has_ended:
            return None
        if is_awake:
            self._judge()
            if self._prompt is not None and not self._prompt.is_settled:
                self._prompt.step()
        self._look_at_prompt()
        release = self.window.take(self._service.clock())
        if release is not None:
            self._note(release)
        return release

    def deadline(self) -> float | None:
        """Return the time on the service's clock at which ``take`` is to be called without any other event."""
        return self.window.deadline()

    def abort(self) -> Release | None:
        """End the answer with what was judged; None where it has ended already."""
        if self.window.has_ended:
            return None
        release = self.window.abort(self._service.clock())
        self.close()
        return release

    def close(self) -> None:
        if self._judgment is not None:
            self._judgment.close()

    def _judge(self) -> None:
        judgment = self._judgment
        if judgment is None:
            return
        before = judgment.verdict
        while judgment.step():
            self._apply(before, judgment)
            before = judgment.verdict
        self._apply(before, judgment)

    def _apply(self, before: Verdict, judgment: Judgment) -> None:
        if judgment.has_failed:
            self.window.fail()
        verdict = judgment.verdict
        if verdict is before:
            return
        self.window.apply(verdict)
        if verdict.replacements and not self.window.is_stopping:
            self._service.record("replace", self._request_id, "answer", verdict, self._excerpt(verdict))

    def _look_at_prompt(self) -> None:
        if self._prompt is None or not self._prompt.is_settled:
            return
        judgment, self._prompt = self._prompt.judgment, None
        if judgment.is_stopped:
            self.window.stop(0, judgment.verdict.rule)
            self._record_stop("prompt", judgment.verdict, 0.0)
        elif judgment.has_failed:
            self.window.fail()
        else:
            self.window.prompt_passed()

    def _note(self, release: Release) -> None:
        if release.tokens or release.text:
            self._service.metrics.released(release.delay, release.num_unjudged)
        if release.is_stopped:
            found = self._judgment.verdict if self._judgment is not None else Verdict(0)
            if found.rule != release.rule:
                found = Verdict(found.upto, Action.STOP, rule=release.rule)
            self._record_stop("answer", found, release.delay)
        if release.is_final:
            self.close()

    def _record_stop(self, side: Side, verdict: Verdict, delay: float) -> None:
        if self._has_recorded:
            return
        self._has_recorded = True
        excerpt = self._excerpt(verdict) if side == "answer" else ""
        self._service.record("stop", self._request_id, side, verdict, excerpt, delay)

    def _excerpt(self, verdict: Verdict) -> str:
        begin = verdict.start if verdict.start >= 0 else verdict.upto
        offset = self._length - len(self._recent)
        return self._recent[max(0, begin - EXCERPT_BEFORE - offset) :]
