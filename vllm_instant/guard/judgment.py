"""One text in the judgment of a guard plugin, behind the plugin's circuit breaker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vllm_instant.deployment.circuit_breaker import ContractError, GuardedPlugin
from vllm_instant.interfaces.guard import Action, Guard, GuardRequest, Replacement, TextJudge, Verdict

SLICE = 8192
"""Maximum number of characters per call of a plugin, so that a long prompt does not delay the other requests."""


class Judgment:
    """The judgment of one text, which may grow.

    Args:
        guarded: The plugin.
        request: What it is told about the text.

    """

    def __init__(self, guarded: GuardedPlugin[Guard], request: GuardRequest) -> None:
        self._guarded = guarded
        self._backlog: list[tuple[str, Sequence[int]]] = []
        self._num_judged_characters = 0
        self._is_finished = False
        self.verdict = Verdict(0)
        self._judge: TextJudge | None = guarded.call("begin", lambda guard: _judge_of(guard.begin(request)), None)

    @property
    def has_failed(self) -> bool:
        """Whether no verdicts will come any longer."""
        return self._judge is None or self._guarded.disabled

    @property
    def is_stopped(self) -> bool:
        return self.verdict.action in (Action.STOP, Action.ESCALATE)

    @property
    def has_passed(self) -> bool:
        """Whether the whole text was judged, and may pass."""
        complete = self._is_finished and not self._backlog
        return complete and not self.is_stopped and self.verdict.upto >= self._num_judged_characters

    def add(self, text: str, token_ids: Sequence[int] = (), is_finished: bool = False) -> None:
        """Add text for the next calls of ``step``."""
        for start in range(0, max(1, len(text)), SLICE):
            self._backlog.append((text[start : start + SLICE], () if start else token_ids))
        self._is_finished = self._is_finished or is_finished

    def step(self) -> bool:
        """Let the plugin judge the next part, or look again at what it has; returns whether parts remain."""
        text, token_ids = self._backlog.pop(0) if self._backlog else ("", ())
        judge = self._judge
        if judge is None or self.is_stopped:
            self._backlog.clear()
            return False
        self._num_judged_characters += len(text)
        ends = self._is_finished and not self._backlog
        before, length = self.verdict, self._num_judged_characters
        found = self._guarded.call(
            "judge", lambda _: _checked(judge.judge(text, tuple(token_ids), ends), before, length), None
        )
        if found is not None:
            self.verdict = found
        return bool(self._backlog)

    def close(self) -> None:
        """The text is not needed any longer."""
        judge, self._judge = self._judge, None
        if judge is not None and (close := getattr(judge, "close", None)) is not None:
            self._guarded.call("close", lambda _: close(), None)


def _judge_of(found: object) -> TextJudge:
    if not callable(getattr(found, "judge", None)):
        raise ContractError(f"begin() must return an object with judge(), not {type(found).__name__}")
    return found  # type: ignore[return-value]


def _checked(found: object, before: Verdict, length: int) -> Verdict:
    """Return the verdict with plain values, or raise ContractError where the protocol does not allow it."""
    if not isinstance(found, Verdict):
        raise ContractError(f"judge() must return a Verdict, not {type(found).__name__}")
    verdict = replace(
        found,
        upto=int(found.upto),
        action=Action(found.action),
        suspect_from=None if found.suspect_from is None else int(found.suspect_from),
        replacements=tuple(Replacement(int(span.start), int(span.end), str(span.text)) for span in found.replacements),
        rule=str(found.rule),
        start=int(found.start),
        tier=str(found.tier),
        seconds=float(found.seconds),
    )
    if not before.upto <= verdict.upto <= length:
        raise ContractError(f"upto = {verdict.upto} is outside of {before.upto} to {length}")
    if verdict.suspect_from is not None and verdict.suspect_from < verdict.upto:
        raise ContractError(f"suspect_from = {verdict.suspect_from} is below upto = {verdict.upto}")
    position = 0
    for span in verdict.replacements:
        if not position <= span.start < span.end <= verdict.upto:
            raise ContractError(f"the replaced span {span.start}:{span.end} is empty, out of order or not judged")
        position = span.end
    return verdict


class PromptJudgment:
    """The judgment of a prompt, on which one or several answers wait.

    Args:
        judgment: The plugin's judgment of the prompt.

    """

    def __init__(self, judgment: Judgment) -> None:
        self.judgment = judgment
        self.listeners: list[Callable[[], None]] = []

    @property
    def is_settled(self) -> bool:
        judgment = self.judgment
        return judgment.has_passed or judgment.is_stopped or judgment.has_failed

    def step(self) -> bool:
        """Judge the next part; returns whether parts remain. Listeners are called once the prompt is settled."""
        remains = self.judgment.step()
        if self.is_settled:
            listeners, self.listeners = self.listeners, []
            for listener in listeners:
                listener()
        return remains and not self.is_settled
