"""A model beside the stream, a classifier or a guard model: every part is scored together with the text before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from vllm_instant.interfaces.guard import Action, Guard, GuardRequest, TextJudge, Verdict


class Scorer(Protocol):
    """Scores texts elsewhere."""

    has_failed: bool
    num_restarts: int

    def submit(self, text: str, on_score: Callable[[float, float], None]) -> None:
        """Score a text, and call ``on_score`` from any thread with the score and the seconds that it took."""
        ...


class ClassifierGuard(Guard):
    """The guards ``classifier`` and ``model``.

    Args:
        process: Scores texts.
        threshold: Score from which a text is stopped.
        escalate_from: Score from which the next tier decides; None for never.
        context_characters: Number of characters, up to the newest, that are scored.

    """

    def __init__(self, process: Scorer, threshold: float, escalate_from: float | None, context_characters: int) -> None:
        self.process = process
        self.threshold = threshold
        self.escalate_from = escalate_from
        self.context_characters = context_characters
        self.num_scored = 0
        self.seconds = 0.0

    def begin(self, request: GuardRequest) -> TextJudge:
        return ClassifierJudge(self, request)

    def metrics(self) -> Mapping[str, float]:
        return {
            "restarts": float(self.process.num_restarts),
            "scored_texts": float(self.num_scored),
            "score_seconds": self.seconds,
        }


class ClassifierJudge(TextJudge):
    """The scores of one text. One part is scored at a time; what comes meanwhile is scored with the next.

    Args:
        guard: The classifier.
        request: Is told when a score arrives.

    """

    def __init__(self, guard: ClassifierGuard, request: GuardRequest) -> None:
        self._guard = guard
        self._wake = request.wake
        self._recent = ""  # the end of the text, as much as is scored at once
        self._length = 0
        self._sent = 0  # what is scored, or is being scored
        self._upto = 0
        self._is_waiting = False
        self._result: tuple[float, float] | None = None
        self._seconds = 0.0
        self._stopped: Verdict | None = None

    def judge(self, text: str, token_ids: Sequence[int], is_finished: bool) -> Verdict:
        if self._guard.process.has_failed:
            raise RuntimeError("the process of the classifier has failed")
        self._recent += text
        self._length += len(text)
        verdict = self._take_result()
        if self._stopped is None and not self._is_waiting and self._sent < self._length:
            self._send()
        return verdict

    def _send(self) -> None:
        # All unscored text belongs to the part, however long it is.
        keep = max(self._guard.context_characters, self._length - self._sent)
        self._recent = self._recent[-keep:]
        self._sent = self._length
        self._is_waiting = True
        self._guard.process.submit(self._recent, self._on_score)

    def _on_score(self, score: float, seconds: float) -> None:
        self._result = (score, seconds)
        self._wake()

    def _take_result(self) -> Verdict:
        if self._stopped is not None:
            return self._stopped
        if self._result is None:
            return Verdict(self._upto)
        (score, self._seconds), self._result, self._is_waiting = self._result, None, False
        guard, before = self._guard, self._upto
        guard.num_scored += 1
        guard.seconds += self._seconds
        if score >= guard.threshold:
            self._stopped = Verdict(before, Action.STOP, rule="unsafe", start=before, seconds=self._seconds)
            return self._stopped
        self._upto = self._sent
        if guard.escalate_from is not None and score >= guard.escalate_from:
            return Verdict(self._upto, Action.ESCALATE, rule="uncertain", start=before, seconds=self._seconds)
        return Verdict(self._upto, seconds=self._seconds)
