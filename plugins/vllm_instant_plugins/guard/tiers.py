"""Several guards over one text: what all of them pass is passed; some are asked only where another is uncertain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vllm_instant.interfaces.guard import Action, Guard, GuardRequest, Replacement, TextJudge, Verdict


@dataclass(frozen=True)
class Tier:
    """One guard of several."""

    name: str
    guard: Guard
    is_asked_always: bool = True
    """Whether it judges all texts; otherwise only from the first escalation of an earlier tier on."""


class Tiers(Guard):
    """The guard ``tiers``.

    Args:
        tiers: From the first to the last.

    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.tiers = tuple(tiers)

    def begin(self, request: GuardRequest) -> TextJudge:
        return TieredJudge(self.tiers, request)

    def metrics(self) -> Mapping[str, float]:
        return {f"{tier.name}_{name}": value for tier in self.tiers for name, value in tier.guard.metrics().items()}


@dataclass
class _Part:
    tier: Tier
    judge: TextJudge | None = None
    upto: int = 0
    suspect_from: int | None = None
    escalated: list[tuple[int, int, str]] = field(default_factory=list)
    """Spans that the next tier must pass, with their rules."""


class TieredJudge(TextJudge):
    """The judgments of one text by all tiers.

    Args:
        tiers: From the first to the last.
        request: What each of them is told.

    """

    def __init__(self, tiers: Sequence[Tier], request: GuardRequest) -> None:
        self._request = request
        self._parts = [_Part(tier) for tier in tiers]
        self._escalating = any(not tier.is_asked_always for tier in tiers)
        # A tier that is asked later must read the text from its beginning.
        self._text = ""
        self._upto = 0
        self._replacements: list[Replacement] = []
        for part in self._parts:
            if part.tier.is_asked_always:
                part.judge = part.tier.guard.begin(request)

    def judge(self, text: str, token_ids: Sequence[int], is_finished: bool) -> Verdict:
        if self._escalating:
            self._text += text
        shown, stops = Verdict(0), []
        for number, part in enumerate(self._parts):
            given = text
            if part.judge is None:
                if not any(earlier.escalated for earlier in self._parts[:number]):
                    continue
                part.judge, given = part.tier.guard.begin(self._request), self._text
            verdict = part.judge.judge(given, token_ids, is_finished)
            if verdict.action is Action.ESCALATE:
                part.escalated.append((verdict.start, verdict.upto, verdict.rule))
                if number + 1 == len(self._parts):
                    verdict = replace(verdict, upto=verdict.start, action=Action.STOP)
            if verdict.action is Action.STOP:
                stops.append(replace(verdict, tier=part.tier.name))
            part.upto, part.suspect_from = verdict.upto, verdict.suspect_from
            self._replacements += verdict.replacements
            if verdict.rule or not shown.rule:
                shown = replace(verdict, tier=part.tier.name)
        return self._stop(min(stops, key=lambda verdict: verdict.upto)) if stops else self._combined(shown)

    def close(self) -> None:
        for part in self._parts:
            if part.judge is not None:
                part.judge.close()

    def _stop(self, verdict: Verdict) -> Verdict:
        """End the text where a tier says, or earlier, where another tier has not passed it yet."""
        passed = min(self._passed(number) for number in range(len(self._parts)))
        return replace(verdict, upto=max(self._upto, min(verdict.upto, passed)), replacements=(), suspect_from=None)

    def _passed(self, number: int) -> int:
        """How far a tier passes the text, with what it has left to the next one."""
        part = self._parts[number]
        asked = self._parts[number + 1].upto if number + 1 < len(self._parts) else 0
        part.escalated = [span for span in part.escalated if asked < span[1]]
        own = part.upto if part.tier.is_asked_always else 1 << 62  # a span waits for it, not the rest of the text
        return min([own, *(start for start, _, _ in part.escalated)])

    def _combined(self, shown: Verdict) -> Verdict:
        upto = min(self._passed(number) for number in range(len(self._parts)))
        self._upto = upto = max(self._upto, upto)
        suspects = [part.suspect_from for part in self._parts if part.suspect_from is not None]
        ready = [span for span in self._replacements if span.end <= upto]
        self._replacements = [span for span in self._replacements if span.end > upto]
        return Verdict(
            upto,
            Action.REPLACE if ready else Action.PASS,
            suspect_from=max(upto, min(suspects)) if suspects else None,
            replacements=ready,
            rule=shown.rule if ready else "",
            start=ready[0].start if ready else -1,
            tier=shown.tier,
            seconds=shown.seconds,
        )
