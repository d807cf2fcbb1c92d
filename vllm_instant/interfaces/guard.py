"""The ``guard`` slot: whether text may reach the client, judged while it is generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from vllm_instant.interfaces.plugins import PluginOptions

Side = Literal["prompt", "answer"]
"""Whether a text is the prompt or the answer of a request."""


class Late(StrEnum):
    """What happens to text without a verdict in time, from the least to the most strict."""

    RELEASE = "release"
    """It is released unjudged: at most ``hold_tokens`` tokens ahead of the verdicts."""
    WAIT = "wait"
    """It waits for its verdict; after ``max_wait_seconds`` the answer is stopped."""
    STOP = "stop"
    """The answer is stopped."""


class GuardOptions(PluginOptions):
    """Base class of the options of a guard plugin."""

    hold_tokens: int = Field(
        16, ge=1, le=4096, description='Maximum number of tokens that late = "release" releases ahead of the verdicts.'
    )
    hold_ms: float = Field(
        50.0, gt=0, le=60_000, description="Milliseconds after which text without a verdict is late."
    )
    late: Late = Field(
        Late.WAIT,
        description='What happens to late text, and to all text once the guard has failed: "wait" for the verdict, '
        '"release" it unjudged, or "stop" the answer.',
    )
    max_wait_seconds: float = Field(
        30.0, gt=0, le=3600, description="Seconds without a verdict after which a waiting answer is stopped."
    )
    side: Literal["prompt", "answer", "both"] = Field("both", description="Which texts are judged.")
    message: str = Field(
        "", description="Text at the end of a stopped answer; it is left out where a schema or grammar applies."
    )
    log_text: bool = Field(
        False, description="Whether the audit line and explain --guard show the text that was stopped or replaced."
    )


class Action(StrEnum):
    """What is done with a text."""

    PASS = "pass"  # noqa: S105
    """The text up to ``Verdict.upto`` may be released."""
    STOP = "stop"
    """The answer ends at ``Verdict.upto``; nothing behind it is released."""
    REPLACE = "replace"
    """As ``PASS``, with the spans of ``Verdict.replacements`` exchanged."""
    ESCALATE = "escalate"
    """The text from ``Verdict.start`` to ``Verdict.upto`` must be judged by the next tier; without one the answer ends
    at ``start``."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """A span of the text, and the text in its place."""

    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """A plugin's judgment of one text. Positions are characters from the text's beginning."""

    upto: int
    """How far the verdict holds. It never decreases from one verdict to the next."""
    action: Action = Action.PASS
    suspect_from: int | None = None
    """Position from which the text may be the beginning of a violation, so that more text must decide; at least
    ``upto``. Such text is not late: it waits for more text or for the end."""
    replacements: Sequence[Replacement] = ()
    """Spans below ``upto`` that no earlier verdict has replaced, in order and without overlap."""
    rule: str = ""
    """Name of the rule or class for which the text is stopped, replaced or escalated."""
    start: int = -1
    """Where the violation begins; -1 where that is ``upto``."""
    tier: str = ""
    """Name of the tier that decided; empty for the plugin itself."""
    seconds: float = 0.0
    """Duration of the judgment, where the plugin knows it."""


@dataclass(frozen=True, kw_only=True)
class GuardRequest:
    """One text that is to be judged."""

    request_id: str
    side: Side
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    """The client's ``vllm_xargs``."""
    is_structured: bool = False
    """Whether a grammar or schema constrains the answer; a replacement then becomes a stop."""
    wake: Callable[[], None] = lambda: None
    """To be called, from any thread, when ``judge`` would return a new verdict for the text that it has."""


@runtime_checkable
class TextJudge(Protocol):
    """The judgment of one text, from its beginning to its end."""

    def judge(self, text: str, token_ids: Sequence[int], is_finished: bool) -> Verdict:
        """Return the verdict on everything so far; must return at once.

        A plugin that works elsewhere returns what it knows and calls ``GuardRequest.wake`` later; ``judge`` is then
        called again without new text.

        Args:
            text: The text since the last call; possibly empty.
            token_ids: The tokens since the last call whose text is complete; empty for prompts that are still typed.
            is_finished: Whether the text ends here.

        """
        ...

    def close(self) -> None:
        """The text is not needed any longer: it was released, stopped or aborted. Optional."""
        return None


@runtime_checkable
class Guard(Protocol):
    """Judges prompts and answers. Runs in the API server.

    ``vllm_instant.guard`` withholds text until it is judged. A plugin that fails is not called again: all text is then
    late, so that ``late`` says what happens to it.
    """

    def begin(self, request: GuardRequest) -> TextJudge:
        """Return the judge of a new text."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Return the plugin's own gauges for ``/metrics``, by name. Optional."""
        return {}
